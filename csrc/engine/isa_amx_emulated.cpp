// The engine of AMX with its instructions in plain C++: for tests, never chosen by itself.
#define HB_ISA amx_emulated
#define HB_CODEC hb::avx512_kernels
#define HB_AMX
#define HB_EMULATE_AMX
#include "isa.inc"

HB_ENGINE(amx_emulated)
