// Which instruction set runs: built ones that the CPU has, best first. Compiled for the baseline only.
#include <cstring>

#include "ops.h"

namespace mwm {

#define MWM_DECLARE(isa) namespace isa { extern const Kernels kKernels; }
#ifdef MWM_HAS_avx512bf16
MWM_DECLARE(avx512bf16)
#endif
#ifdef MWM_HAS_avx512
MWM_DECLARE(avx512)
#endif
#ifdef MWM_HAS_avx2
MWM_DECLARE(avx2)
#endif
#ifdef MWM_HAS_portable
MWM_DECLARE(portable)
#endif
#undef MWM_DECLARE

namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
  bool (*present)();
};

const Choice kChoices[] = {
#ifdef MWM_HAS_avx512bf16
    {"avx512bf16", &avx512bf16::kKernels, [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
                                                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"); }},
#endif
#ifdef MWM_HAS_avx512
    {"avx512", &avx512::kKernels, [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"); }},
#endif
#ifdef MWM_HAS_avx2
    {"avx2", &avx2::kKernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
#ifdef MWM_HAS_portable
    {"portable", &portable::kKernels, [] { return true; }},
#endif
};

const Choice* best() {
  for (const Choice& choice : kChoices)
    if (choice.present()) return &choice;
  return nullptr;
}

const Choice*& current() {
  static const Choice* choice = best();
  return choice;
}

}  // namespace

const Kernels& kernels() { return *current()->kernels; }

const char* isa() { return current()->name; }

const char* available_isa(int i) {
  for (const Choice& choice : kChoices)
    if (choice.present() && i-- == 0) return choice.name;
  return nullptr;
}

bool set_isa(const char* name) {
  for (const Choice& choice : kChoices) {
    if (std::strcmp(choice.name, name) == 0 && choice.present()) {
      current() = &choice;
      return true;
    }
  }
  return false;
}

}  // namespace mwm
