// Dense map to tiles and back. Pure data movement, bound by memory; work is cut by tile (pack) or by row of patches (unpack).
#include "conv_window.h"
#include "stream.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// Interleaves planes: to[j * width + c] = from[j * column + c * channel] for a fixed small number of channels.
template <int kChannels, class T>
void interleave(const T* from, int64_t from_column, int64_t from_channel, T* to, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j)
    for (int c = 0; c < kChannels; ++c) to[j * kChannels + c] = from[j * from_column + c * from_channel];
}

// Copies a rows x columns x channels block between two strided places.
template <class T>
void copy_block(const T* from, int64_t from_row, int64_t from_column, int64_t from_channel, T* to, int64_t to_row, int64_t to_column,
                int64_t rows, int64_t columns, int64_t channels) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* source = from + i * from_row;
    T* target = to + i * to_row;
    if ((from_channel == 1 || channels == 1) && from_column == channels && to_column == channels) {
      std::memcpy(target, source, static_cast<size_t>(columns * channels) * sizeof(T));
    } else if (from_channel == 1) {
      for (int64_t j = 0; j < columns; ++j) std::memcpy(target + j * to_column, source + j * from_column, static_cast<size_t>(channels) * sizeof(T));
    } else if (channels == 3 && to_column == 3) {
      interleave<3>(source, from_column, from_channel, target, columns);
    } else {
      // Sixteen planes at a time: one cache line is written at once, and read from as few as fit.
      for (int64_t first = 0; first < channels; first += 16) {
        const int64_t last = least<int64_t>(first + 16, channels);
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t c = first; c < last; ++c) target[j * to_column + c] = source[j * from_column + c * from_channel];
      }
    }
  }
}

uint64_t fill_bits(double fill, DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return bit_copy<uint64_t>(fill);
    case DType::kFloat32: return bit_copy<uint32_t>(static_cast<float>(fill));
    case DType::kComplex64: return bit_copy<uint32_t>(static_cast<float>(fill));
    case DType::kBFloat16: return narrow<BFloat16>(static_cast<float>(fill)).bits;
    case DType::kFloat16: return narrow<Half>(static_cast<float>(fill)).bits;
    case DType::kBool: return fill != 0;
    default: return static_cast<uint64_t>(static_cast<int64_t>(fill));
  }
}

}  // namespace

void pack_tiles(const View& x, const View& coords, const View& slots, const View& out, int64_t threads) {
  check("pack_tiles: x", x, 4);
  check("pack_tiles: out", out, 4, x.dtype);
  check_channels_last("pack_tiles: out", out);
  check_plan("pack_tiles", coords, slots);
  const int64_t tiles = coords.shape[0], channels = x.shape[1], edge = out.shape[2];
  if (out.shape[0] != tiles || out.shape[1] != channels || out.shape[3] != edge || x.shape[0] != slots.shape[0] ||
      x.shape[2] != slots.shape[1] * edge || x.shape[3] != slots.shape[2] * edge)
    fail("pack_tiles: x does not divide into the tiles of the plan");
  const int32_t* place = pointer<int32_t>(coords);
  with_bits("pack_tiles", x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t size = edge * edge * channels;
    parallel_for(tiles, most<int64_t>(1, 16384 / (size + 1)), threads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* from = pointer<T>(x) + place[3 * n] * x.strides[0] + place[3 * n + 1] * edge * x.strides[2] + place[3 * n + 2] * edge * x.strides[3];
        copy_block(from, x.strides[2], x.strides[3], x.strides[1], pointer<T>(out) + n * size, edge * channels, channels, edge, edge, channels);
      }
    });
  });
}

void unpack_tiles(const View& tiles, const View& slots, double fill, const View& token, const View& out, int64_t threads) {
  check("unpack_tiles: tiles", tiles, 4);
  check("unpack_tiles: out", out, 4, tiles.dtype);
  check("unpack_tiles: slots", slots, 3, DType::kInt32);
  check_contiguous("unpack_tiles: slots", slots);
  check_channels_last("unpack_tiles: out", out);
  const int64_t batch = slots.shape[0], rows = slots.shape[1], columns = slots.shape[2];
  const int64_t channels = tiles.shape[1], edge = tiles.shape[2];
  if (tiles.shape[3] != edge || out.shape[0] != batch || out.shape[1] != channels || out.shape[2] != rows * edge || out.shape[3] != columns * edge)
    fail("unpack_tiles: out does not have the shape of the dense map");
  if (!is_none(token)) {
    check("unpack_tiles: token", token, 1, tiles.dtype);
    check_contiguous("unpack_tiles: token", token);
    if (token.shape[0] != channels) fail("unpack_tiles: token must have the channels of tiles");
  }
  const int32_t* slot = pointer<int32_t>(slots);
  for (int64_t i = 0; i < batch * rows * columns; ++i)
    if (slot[i] < -1 || slot[i] >= tiles.shape[0]) fail("unpack_tiles: slots must lie in [-1, T). Use build_plan.");
  const uint64_t bits = fill_bits(fill, tiles.dtype);
  with_bits("unpack_tiles", tiles.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T value = static_cast<T>(bits);
    const int64_t line = columns * edge * channels, row_bytes = edge * channels * int64_t{sizeof(T)};
    const bool stream = batch * rows * edge * line * int64_t{sizeof(T)} >= kStreamBytes && row_bytes % kLine == 0 &&
                        reinterpret_cast<std::uintptr_t>(out.data) % kLine == 0 && is_channels_last(tiles);
    Scratch<T> hidden(edge * channels);  // a row of a hidden tile
    for (int64_t i = 0; i < edge * channels; ++i) hidden[i] = is_none(token) ? value : pointer<T>(token)[i % channels];
    parallel_for(batch * rows, most<int64_t>(1, 16384 / (line * edge + 1)), threads, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        T* to = pointer<T>(out) + strip * edge * line;
        for (int64_t c = 0; c < columns; ++c, to += edge * channels) {
          const int64_t n = slot[strip * columns + c];
          if (stream) {
            const char* from = n < 0 ? reinterpret_cast<const char*>(hidden.data()) : static_cast<const char*>(tiles.data) + n * edge * row_bytes;
            for (int64_t i = 0; i < edge; ++i) stream_lines(reinterpret_cast<char*>(to + i * line), from + (n < 0 ? 0 : i * row_bytes), row_bytes);
            continue;
          }
          if (n >= 0) {
            copy_block(pointer<T>(tiles) + n * tiles.strides[0], tiles.strides[2], tiles.strides[3], tiles.strides[1], to, line, channels, edge, edge, channels);
            continue;
          }
          for (int64_t i = 0; i < edge; ++i) std::memcpy(to + i * line, hidden.data(), static_cast<size_t>(row_bytes));
        }
      }
      if (stream) finish_streaming();
    });
  });
}

void unpack_tiles_grad_token(const View& grad, const View& slots, const View& sums, const View& out, int64_t threads) {
  const char* op = "unpack_tiles_grad_token";
  check(op, grad, 4);
  check_channels_last(op, grad);
  check(op, slots, 3, DType::kInt32);
  check_contiguous(op, slots);
  check(op, sums, 3, grad.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  check_contiguous(op, sums);
  check(op, out, 1, grad.dtype);
  check_contiguous(op, out);
  const int64_t batch = slots.shape[0], rows = slots.shape[1], columns = slots.shape[2], channels = grad.shape[1];
  if (grad.shape[0] != batch || rows == 0 || columns == 0 || grad.shape[2] % rows || grad.shape[3] % columns || grad.shape[2] / rows != grad.shape[3] / columns)
    fail("%s: grad does not divide into the tiles of the plan", op);
  if (out.shape[0] != channels || sums.shape[0] != batch || sums.shape[1] != rows || sums.shape[2] != channels) fail("%s: sums and out do not fit the channels", op);
  const int64_t edge = grad.shape[2] / rows, line = columns * edge * channels;
  const int32_t* slot = pointer<int32_t>(slots);
  with_float(op, grad.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename Wide<E>::type;
    // Rows are summed on their own, then rows of patches, then all: small errors, and the same whatever the number of threads.
    parallel_for(batch * rows, most<int64_t>(1, 16384 / (line * edge + 1)), threads, [&](int64_t begin, int64_t end) {
      Scratch<T> of_row(channels);
      for (int64_t strip = begin; strip < end; ++strip) {
        T* total = pointer<T>(sums) + strip * channels;
        std::memset(total, 0, static_cast<size_t>(channels) * sizeof(T));
        for (int64_t i = 0; i < edge; ++i) {
          std::memset(of_row.data(), 0, static_cast<size_t>(channels) * sizeof(T));
          const E* from = pointer<E>(grad) + (strip * edge + i) * line;
          for (int64_t j = 0; j < columns * edge; ++j, from += channels) {
            if (slot[strip * columns + j / edge] >= 0) continue;
            for (int64_t c = 0; c < channels; ++c) of_row[c] += widen(from[c]);
          }
          for (int64_t c = 0; c < channels; ++c) total[c] += of_row[c];
        }
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      T total{};
      for (int64_t strip = 0; strip < batch * rows; ++strip) total += pointer<T>(sums)[strip * channels + c];
      put(pointer<E>(out)[c], total);
    }
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
