#define HB_ISA portable
#include "isa.inc"

const hb::Engine hb::portable_engine = {
    "portable",
    &portable_kernels,
    {HB_BLOCK_BF16, nullptr, HB_BLOCK_FLOAT},
    {HB_ATTENTION_BF16, nullptr, HB_ATTENTION_FLOAT},
};
