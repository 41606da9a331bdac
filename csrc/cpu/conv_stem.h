// The path of windows over few channels, as in stems: see tile_conv_stem.cpp.
#pragma once

#include "conv_filters.h"

namespace mwm {
namespace MWM_ISA {

// Few channels make a tap too short to multiply on its own; a whole row of taps is contiguous when nothing is skipped.
inline bool is_stem(const Window& w, int64_t channels) { return w.groups == 1 && w.dilation_w == 1 && w.kernel_w > 1 && channels <= 8; }

// `panels` as Filters::pack_panel writes them in the type of the sums.
void stem_forward(const View& x, const Neighbours& plan, const Window& w, const Filters& filters, const void* panels, const View& bias, const View& out,
                  int64_t threads);

// Adds nothing: writes partial sums [splits][K][kh][kw][C] in the type of the sums.
void stem_grad_weight(const View& grad, const View& x, const Neighbours& plan, const Window& w, const View& sums, int64_t threads);

}  // namespace MWM_ISA
}  // namespace mwm
