#define HB_ISA avx512
#include "isa.inc"

const hb::Engine hb::avx512_engine = {
    "avx512",
    &avx512_kernels,
    {HB_BLOCK_BF16, nullptr, HB_BLOCK_FLOAT},
    {HB_ATTENTION_BF16, nullptr, HB_ATTENTION_FLOAT},
};
