#define HB_ISA portable
#define HB_CODEC hb::portable_kernels
#include "isa.inc"

HB_ENGINE(portable)
