#define HB_ISA avx512
#define HB_CODEC hb::avx512_kernels
#include "isa.inc"

HB_ENGINE(avx512)
