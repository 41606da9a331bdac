// Parallel loops on the OpenMP runtime that the process has already loaded, see parallel.cpp.
#pragma once

#include <cstdint>

namespace mwm {

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// Calls body on disjoint ranges that cover [0, count), on at most `threads` threads and never on ranges shorter than `grain`
// (but for the last). The body must not throw, and its result must not depend on how the range is cut.
void parallel_run(int64_t count, int64_t grain, int64_t threads, RangeBody body, void* context);

// "openmp (GOMP_parallel in /path)", "openmp (__kmpc_fork_call in /path)", "pool", or "inline" after a fork.
const char* thread_runtime();
// For tests: "openmp", "pool" or "inline"; false when it is not there.
bool set_thread_runtime(const char* name);

namespace {

template <class Body>
inline void parallel_for(int64_t count, int64_t grain, int64_t threads, const Body& body) {
  parallel_run(count, grain, threads, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
               const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace
}  // namespace mwm
