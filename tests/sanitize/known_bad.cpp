// Kernels that are wrong on purpose, one per kind of finding. scripts/sanitize.sh trusts a clean run of a build only after the
// build has flagged these. They are compiled with the flags of the real kernels and called the same way: views of torch's memory
// in, loops through parallel_for. Part of no other build.
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/simd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// One vector that begins inside the tensor and ends behind it, as a loop without its tail would load.
void read_past_the_end(const View& x, const View& out) {
  const int64_t count = x.shape[0];
  store(pointer<float>(out), load(pointer<float>(x) + count - kLanes<float> + 1));
}

void overflow_signed(const View& x, const View& out) {
  const int32_t* from = pointer<int32_t>(x);
  pointer<int32_t>(out)[0] = from[0] + from[1];
}

void load_misaligned(const View& x, const View& out) {
  const unsigned char* bytes = pointer<unsigned char>(x);
  pointer<int32_t>(out)[0] = *reinterpret_cast<const int32_t*>(bytes + 1);
}

// Every body adds to the same element.
void write_one_element_from_two_threads(const View& x, const View& out) {
  volatile float* sum = pointer<float>(out);
  parallel_for(2, 1, 2, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t i = 0; i < x.shape[0]; ++i) *sum = *sum + pointer<float>(x)[i];
  });
}

}  // namespace
}  // namespace MWM_ISA

// False when the name is unknown. Such a build has one instruction set, so that this is defined once.
bool run_known_bad(const char* name, const View& x, const View& out);
bool run_known_bad(const char* name, const View& x, const View& out) {
  using namespace MWM_ISA;
  if (!std::strcmp(name, "read_past_the_end")) read_past_the_end(x, out);
  else if (!std::strcmp(name, "overflow_signed")) overflow_signed(x, out);
  else if (!std::strcmp(name, "load_misaligned")) load_misaligned(x, out);
  else if (!std::strcmp(name, "write_one_element_from_two_threads")) write_one_element_from_two_threads(x, out);
  else return false;
  return true;
}

}  // namespace mwm
