#define HB_ISA avx512bf16
#include "isa.inc"

const hb::Engine hb::avx512bf16_engine = {
    "avx512bf16",
    &avx512_kernels,
    {HB_BLOCK_BF16, nullptr, HB_BLOCK_FLOAT},
    {HB_ATTENTION_BF16, nullptr, HB_ATTENTION_FLOAT},
};
