#define HB_ISA amx
#define HB_CODEC hb::avx512_kernels
#define HB_AMX
#include "isa.inc"

HB_ENGINE(amx)
