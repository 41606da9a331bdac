// CUDA on a CPU, for tests: the sources of csrc/cuda compiled by a plain C++ compiler with the launch code that they ship.
//
// Blocks run one after the other; a block's threads are fibers that change at barriers, in an order that the test chooses, so that a
// result that depends on the order (a race) shows. Shared memory is static. A barrier that not all threads reach, a shuffle in
// a broken warp and a failed MWM_REQUIRE end the launch with an exception.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define MWM_UNROLL
#define MWM_UNROLL_BY(count)
#define MWM_REQUIRE(condition, message) \
  do { \
    if (!(condition)) emulate::refuse(message); \
  } while (0)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline int cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(int) { return ""; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

inline int order = 0;  // of threads and blocks: 0 forwards, 1 backwards, more: shuffled

enum class State { kReady, kBlock, kWarp, kDone };

// A thread's place of execution. ucontext asks the kernel for the signal mask on every change, which costs more than most threads
// of a test do; on x86-64 the registers that a call must keep are enough.
#if defined(__x86_64__)
struct Context {
  void* top = nullptr;
};
__attribute__((naked, noinline)) inline void change(void**, void*) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\tmovq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
inline void change(Context& from, Context& to) { change(&from.top, to.top); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.top = top;
}
#else
using Context = ucontext_t;
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fiber {
  Context context;
  State state;
};

constexpr int kMaxThreads = 1024, kWarpSize = 32;
constexpr size_t kStack = 128 * 1024;

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  char* stacks = static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  Context scheduler;
  const std::function<void()>* body = nullptr;
  int current = 0, threads = 0;
  const char* message = nullptr;
  uint64_t exchange[kMaxThreads];
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void yield(State state) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  change(fiber.context, m.scheduler);
}

inline void refuse(const char* message) {
  Machine& m = machine();
  if (!m.message) m.message = message;
  yield(State::kDone);
}

inline void entry() {
  (*machine().body)();
  yield(State::kDone);
}

inline bool release(Machine& m, int first, int last, State state) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    if (m.fibers[i].state != state && m.fibers[i].state != State::kDone) return false;
    any |= m.fibers[i].state == state;
  }
  for (int i = first; any && i < last; ++i)
    if (m.fibers[i].state == state) m.fibers[i].state = State::kReady;
  return any;
}

inline std::vector<int> sequence(int64_t count, std::mt19937& random) {
  std::vector<int> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random);
  return numbers;
}

inline void run_block(Machine& m, std::mt19937& random) {
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    prepare(fiber.context, m.stacks + kStack * static_cast<size_t>(i), kStack, entry);
    fiber.state = State::kReady;
  }
  for (bool more = true; more;) {
    for (int i : sequence(m.threads, random)) {
      if (m.fibers[i].state != State::kReady) continue;
      m.current = i;
      threadIdx = dim3(static_cast<unsigned>(i));
      change(m.scheduler, m.fibers[i].context);
      if (m.message) {
#if defined(__SANITIZE_ADDRESS__)
        // The threads that stop here leave marks around their variables on stacks that are used again.
        __asan_unpoison_memory_region(m.stacks, kStack * kMaxThreads);
#endif
        throw std::runtime_error(std::string("device-side assertion: ") + m.message);
      }
    }
    bool waiting = false, released = false;
    for (int first = 0; first < m.threads; first += kWarpSize) released |= release(m, first, std::min(first + kWarpSize, m.threads), State::kWarp);
    if (!released) released = release(m, 0, m.threads, State::kBlock);
    for (int i = 0; i < m.threads; ++i) waiting |= m.fibers[i].state != State::kDone;
    if (waiting && !released) throw std::runtime_error("emulate: a barrier that not all threads reach");
    more = waiting;
  }
}

inline void run(const char* op, dim3 grid, dim3 block, const std::function<void()>& body) {
  Machine& m = machine();
  if (block.x == 0 || block.x > kMaxThreads) throw std::runtime_error(std::string(op) + ": emulate: a block has 1 to 1024 threads");
  m.body = &body, m.threads = static_cast<int>(block.x), m.message = nullptr;
  blockDim = block, gridDim = grid;
  std::mt19937 random(static_cast<unsigned>(order));
  for (int index : sequence(static_cast<int64_t>(grid.x) * grid.y, random)) {
    blockIdx = dim3(static_cast<unsigned>(index) % grid.x, static_cast<unsigned>(index) / grid.x);
    run_block(m, random);
  }
}

template <class T>
T shuffle(T value, int from) {
  Machine& m = machine();
  const int lane = m.current % kWarpSize, first = m.current - lane;
  if (first + kWarpSize > m.threads) refuse("emulate: a shuffle in an incomplete warp");
  for (int i = first; i < first + kWarpSize; ++i)
    if (m.fibers[i].state == State::kDone) refuse("emulate: a shuffle after a thread of the warp has ended");
  static_assert(sizeof(T) <= 8);
  m.exchange[m.current] = 0;
  std::memcpy(&m.exchange[m.current], &value, sizeof value);
  yield(State::kWarp);
  T result;
  std::memcpy(&result, &m.exchange[first + from], sizeof result);
  yield(State::kWarp);
  return result;
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bfloat16(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_half(uint16_t half) {
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24));
}
inline uint16_t to_half(float x) {
  const uint16_t sign = static_cast<uint16_t>((float_to_bits(x) >> 16) & 0x8000u);
  const float size = std::fabs(x);
  if (x != x) return 0x7e00;
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = std::max(exponent - 1, -14);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // of 2^(exponent - 10)
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps));
}

}  // namespace emulate

inline void __syncthreads() { emulate::yield(emulate::State::kBlock); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulate::yield(emulate::State::kWarp); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulate::shuffle(value, emulate::machine().current % emulate::kWarpSize ^ mask); }
template <class T>
T __shfl_sync(unsigned, T value, int from) { return emulate::shuffle(value, from % emulate::kWarpSize); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned bits = predicate ? 1u << (emulate::machine().current % emulate::kWarpSize) : 0u;
  for (int step = 1; step < emulate::kWarpSize; step *= 2) bits |= __shfl_xor_sync(mask, bits, step);
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __double2int_rn(double x) { return static_cast<int>(std::nearbyint(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
