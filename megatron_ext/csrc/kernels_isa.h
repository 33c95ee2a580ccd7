// The kernels for one instruction set: KERNELS_WIDTH floats per vector; KERNELS_SCALE computes x 2^k
// if there is an instruction for it.
// Included once for every set (no include guard), inside its namespace.
#include "kernels_simd.h"
//
#include "kernels_product.h"
//
#include "kernels_norm.h"
//
#include "kernels_activation.h"
#include "kernels_attention.h"
#include "kernels_cross_entropy.h"
#include "kernels_distillation.h"
#include "kernels_optimizer.h"
#include "kernels_rope.h"
#include "kernels_weight_gradient.h"

#undef KERNELS_WIDTH
#undef KERNELS_SCALE
#undef INLINE
#undef FOR_LANES
