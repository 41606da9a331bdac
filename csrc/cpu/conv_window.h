// Where the positions of a tile find their sources under a window: arithmetic on tile coordinates, made once per call.
#pragma once

#include <cstdlib>

#include "isa.h"

namespace mwm {
namespace MWM_ISA {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Memory for one call or one task, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(round_up(most<int64_t>(count, 1) * sizeof(T), 64))))) {
    if (!data_) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// The geometry of ops/conv_geometry.py with the kernel's size.
struct Window {
  int64_t kernel_h, kernel_w, stride, dilation_h, dilation_w, left, top, groups;

  int64_t taps() const { return kernel_h * kernel_w; }
};

inline Window window_of(const char* op, const Ints& numbers, int64_t kernel_h, int64_t kernel_w) {
  if (numbers.count != 8) fail("%s: geometry must have 8 numbers, got %d", op, numbers.count);
  const int64_t* n = numbers.values;
  if (n[0] < 1 || n[1] < 1 || n[2] < 1 || n[7] < 1 || kernel_h < 1 || kernel_w < 1) fail("%s: geometry must be positive", op);
  if (kernel_h > 32767 || kernel_w > 32767 || n[1] > 32767 || n[2] > 32767) fail("%s: kernel and dilation must be below 32768", op);
  return {kernel_h, kernel_w, n[0], n[1], n[2], n[3], n[5], n[7]};
}

// Places [T, 3] of the tiles that are written, and the slots [B, Gh, Gw] that number the tiles that are read, `sources` of them; it
// bounds every index a kernel derives from the two. They may come from two plans of one grid.
inline void check_places(const char* op, const View& coords, const View& slots, int64_t sources) {
  check(op, coords, 2, DType::kInt32);
  check(op, slots, 3, DType::kInt32);
  check_contiguous(op, coords);
  check_contiguous(op, slots);
  const int64_t tiles = coords.shape[0], batch = slots.shape[0], rows = slots.shape[1], columns = slots.shape[2];
  if (coords.shape[1] != 3) fail("%s: coords must be [T, 3]", op);
  const int32_t* place = static_cast<const int32_t*>(coords.data);
  const int32_t* slot = static_cast<const int32_t*>(slots.data);
  for (int64_t n = 0; n < tiles; ++n) {
    const int64_t b = place[3 * n], r = place[3 * n + 1], c = place[3 * n + 2];
    if (b < 0 || b >= batch || r < 0 || r >= rows || c < 0 || c >= columns)
      fail("%s: coords of tile %lld do not fit the plan's grid. Use build_plan.", op, static_cast<long long>(n));
  }
  const int64_t patches = batch * rows * columns;
  for (int64_t i = 0; i < patches; ++i)
    if (slot[i] < -1 || slot[i] >= sources) fail("%s: slots must lie in [-1, T). Use build_plan.", op);
}

// For one axis: position i of a target tile and tap u read `position` of the tile `tile` steps away; position -1: nothing.
class Axis {
 public:
  Axis(int64_t target_edge, int64_t source_edge, int64_t taps, int64_t stride, int64_t dilation, int64_t padding, bool adjoint)
      : edge_(target_edge), entries_(target_edge * taps) {
    for (int64_t u = 0; u < taps; ++u)
      for (int64_t i = 0; i < target_edge; ++i) {
        const int64_t offset = u * dilation - padding;
        int64_t source = i * stride + offset;
        bool valid = true;
        if (adjoint) {
          valid = (i - offset) - floor_div(i - offset, stride) * stride == 0;
          source = floor_div(i - offset, stride);
        }
        const int64_t tile = floor_div(source, source_edge);
        entries_[u * target_edge + i] = {static_cast<int32_t>(tile), static_cast<int32_t>(valid ? source - tile * source_edge : -1)};
      }
  }

  struct Entry {
    int32_t tile, position;
  };
  const Entry* tap(int64_t u) const { return entries_.data() + u * edge_; }

 private:
  int64_t edge_;
  Scratch<Entry> entries_;
};

// Tiles, their places and the two axes: finds the source row of every target position under a tap.
struct Neighbours {
  const int32_t* coords;
  const int32_t* slots;
  int64_t rows, columns, target_edge, source_edge;
  Axis vertical, horizontal;

  Neighbours(const View& coords_view, const View& slots_view, const Window& w, int64_t target, int64_t source, bool adjoint)
      : coords(pointer<int32_t>(coords_view)), slots(pointer<int32_t>(slots_view)), rows(slots_view.shape[1]), columns(slots_view.shape[2]),
        target_edge(target), source_edge(source), vertical(target, source, w.kernel_h, w.stride, w.dilation_h, w.top, adjoint),
        horizontal(target, source, w.kernel_w, w.stride, w.dilation_w, w.left, adjoint) {}

  // Slots of the tile row that tap row u of position row i of tile n reads, and the source row in it; nullptr: nothing.
  const int32_t* slot_row(int64_t n, int64_t i, int64_t u, int64_t* position) const {
    const Axis::Entry entry = vertical.tap(u)[i];
    if (entry.position < 0) return nullptr;
    const int64_t row = coords[3 * n + 1] + entry.tile;
    if (row < 0 || row >= rows) return nullptr;
    *position = entry.position;
    return slots + (coords[3 * n] * rows + row) * columns;
  }

  // Target and source rows that tap (u, v) joins, for target units [begin, end); a unit is one row of positions of one tile.
  // Targets count from the first position of `begin`. Returns the number of pairs, at most (end - begin) * target_edge.
  int64_t pairs(int64_t begin, int64_t end, int64_t u, int64_t v, int64_t* target, int64_t* source) const {
    int64_t count = 0;
    const Axis::Entry* across = horizontal.tap(v);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / target_edge;
      int64_t position;
      const int32_t* row = slot_row(n, unit - n * target_edge, u, &position);
      if (!row) continue;
      const int64_t column = coords[3 * n + 2];
      int32_t tile = INT32_MIN;
      int64_t base = -1;
      const int64_t first = (unit - begin) * target_edge;
      for (int64_t j = 0; j < target_edge; ++j) {
        const Axis::Entry entry = across[j];
        if (entry.tile != tile) {
          tile = entry.tile;
          const int64_t at = column + tile;
          const int32_t slot = at < 0 || at >= columns ? -1 : row[at];
          base = slot < 0 ? -1 : (slot * source_edge + position) * source_edge;
        }
        if (base < 0 || entry.position < 0) continue;
        target[count] = first + j;
        source[count++] = base + entry.position;
      }
    }
    return count;
  }
};

}  // namespace MWM_ISA
}  // namespace mwm
