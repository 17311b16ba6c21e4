#define HB_ISA avx2
#include "isa.inc"

const hb::Engine hb::avx2_engine = {
    "avx2",
    &avx2_kernels,
    {HB_BLOCK_BF16, nullptr, HB_BLOCK_FLOAT},
    {HB_ATTENTION_BF16, nullptr, HB_ATTENTION_FLOAT},
};
