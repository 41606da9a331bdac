// Numbers the visible patches: a warp per image, ballots give the order. Where the count per image is known this is one launch and
// nobody looks at the mask; where it is not, plan_offsets counts first and the caller waits for the total.
#include "device.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kThreads = 128, kScanThreads = 1024;

struct Mask {
  const uint8_t* active;
  int64_t image, row, column;  // strides
  int32_t rows, columns;
  int64_t batch;

  __device__ bool seen(int64_t b, int patch) const { return active[b * image + patch / columns * row + patch % columns * column] != 0; }
};

// offsets[b + 1] = number of visible patches of image b.
__global__ void __launch_bounds__(kThreads) count_kernel(Mask mask, int32_t* offsets) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, patches = mask.rows * mask.columns;
  if (b >= mask.batch) return;
  int count = 0;
  for (int i = lane; i < patches; i += kWarp) count += mask.seen(b, i);
  for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(kFullWarp, count, step);
  if (lane == 0) offsets[b + 1] = count;
}

// Running sums in place, by one block: each thread sums a stretch, the stretches' sums are summed, and each thread goes over its own again.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t batch, int32_t* offsets) {
  __shared__ int32_t sums[kScanThreads];
  const int64_t thread = threadIdx.x, first = batch * thread / kScanThreads, last = batch * (thread + 1) / kScanThreads;
  int32_t sum = 0;
  for (int64_t b = first; b < last; ++b) sum += offsets[b + 1];
  sums[thread] = sum;
  __syncthreads();
  for (int step = 1; step < kScanThreads; step *= 2) {
    const int32_t before = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  sum = sums[thread] - sum;
  for (int64_t b = first; b < last; ++b) offsets[b + 1] = sum += offsets[b + 1];
  if (thread == 0) offsets[0] = 0;
}

// visible < 0: the offsets are there; else they follow from it and are written.
__global__ void __launch_bounds__(kThreads) place_kernel(Mask mask, int64_t visible, int64_t tiles, int32_t* coords, int32_t* slots, int32_t* offsets) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, patches = mask.rows * mask.columns;
  if (b >= mask.batch) return;
  const int64_t first = visible < 0 ? offsets[b] : b * visible;
  int64_t n = first;
  for (int start = 0; start < patches; start += kWarp) {
    const int patch = start + lane;
    const bool seen = patch < patches && mask.seen(b, patch);
    const unsigned all = __ballot_sync(kFullWarp, seen);
    const int64_t mine = n + __popc(all & ((1u << lane) - 1));
    if (patch < patches) slots[b * patches + patch] = seen && mine < tiles ? static_cast<int32_t>(mine) : -1;
    if (seen && mine < tiles) {
      coords[3 * mine] = static_cast<int32_t>(b);
      coords[3 * mine + 1] = patch / mask.columns;
      coords[3 * mine + 2] = patch % mask.columns;
    }
    n += __popc(all);
  }
  if (visible >= 0) {
    MWM_REQUIRE(n - first == visible, "build_plan: visible must be the number of visible patches of every image. Leave visible out where it is not constant.");
    if (lane == 0) {
      offsets[b] = static_cast<int32_t>(first);
      if (b == mask.batch - 1) offsets[b + 1] = static_cast<int32_t>(n);
    }
  } else {
    MWM_REQUIRE(n == offsets[b + 1] && n <= tiles, "build_plan: active changed while it was read.");
  }
}

Mask mask_of(const View& active, const View& offsets) {
  const char* op = "build_plan";
  check(op, active, 3, DType::kBool);
  check(op, offsets, 1, DType::kInt32);
  check_contiguous(op, offsets);
  if (offsets.shape[0] != active.shape[0] + 1) fail("%s: offsets must have one number per image and one more", op);
  if (element_count(op, active) > INT32_MAX) fail("%s: active has more than 2^31 patches", op);
  return {pointer<uint8_t>(active), active.strides[0], active.strides[1], active.strides[2], static_cast<int32_t>(active.shape[1]), static_cast<int32_t>(active.shape[2]),
          active.shape[0]};
}

}  // namespace

void plan_offsets(const View& active, const View& offsets, int64_t device, int64_t stream) {
  const Mask mask = mask_of(active, offsets);
  const Place place(device, stream);
  launch("build_plan", place, ceil_div<int64_t>(mask.batch, kThreads / kWarp), 1, kThreads, count_kernel, mask, pointer<int32_t>(offsets));
  launch("build_plan", place, 1, 1, kScanThreads, scan_kernel, mask.batch, pointer<int32_t>(offsets));
}

void build_plan(const View& active, int64_t visible, const View& coords, const View& slots, const View& offsets, int64_t device, int64_t stream) {
  const char* op = "build_plan";
  const Mask mask = mask_of(active, offsets);
  check(op, coords, 2, DType::kInt32);
  check(op, slots, 3, DType::kInt32);
  check_contiguous(op, coords);
  check_contiguous(op, slots);
  for (int i = 0; i < 3; ++i)
    if (slots.shape[i] != active.shape[i]) fail("%s: slots must have the shape of active", op);
  if (coords.shape[1] != 3 || (visible >= 0 && coords.shape[0] != mask.batch * visible)) fail("%s: coords must be [T, 3] with T visible patches", op);
  const Place place(device, stream);
  launch(op, place, ceil_div<int64_t>(mask.batch, kThreads / kWarp), 1, kThreads, place_kernel, mask, visible, coords.shape[0], pointer<int32_t>(coords), pointer<int32_t>(slots),
         pointer<int32_t>(offsets));
  // Without an image nobody writes the one offset that there is.
  if (mask.batch == 0) launch(op, place, 1, 1, kScanThreads, scan_kernel, mask.batch, pointer<int32_t>(offsets));
}

}  // namespace cuda
}  // namespace mwm
