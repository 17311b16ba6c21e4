#define HB_ISA avx2
#define HB_CODEC hb::avx2_kernels
#include "isa.inc"

HB_ENGINE(avx2)
