// The CUDA kernel of log_mel, thread by thread, in host code too: csrc/cuda/log_mel.cu runs it on the device,
// csrc/cpu/log_mel_emulated.cpp on the host, where tests execute it block by block.
//
// A tile is 32 consecutive frames of a clip, one a lane; the warps share out the 16 rows and 13 columns of the
// transform (fft400.h). So no lane ever meets another, every table is read by a whole warp at one address, and
// neighbouring lanes read neighbouring words. Of the mels, whose bands are short, a warp takes four at a time and a
// lane four frames of one. Between the steps lies a barrier:
//   put      the tile's samples, fetched one tile ahead
//   rows     window and 25-point DFTs, samples -> spectrum
//   columns  16-point DFTs, spectrum -> powers, which take the memory of the samples, in the columns' order
//   mels     banded mel, whose weights come with the places of their powers, logarithm, normalisation, one store
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"
#include "fft400.h"
#include "log_mel_math.h"

namespace matpac::log_mel_block {

using namespace fft400;

constexpr int kFrames = 32;  // a tile's: the lanes of a warp
constexpr int kWarps = 16;   // a row each; two such blocks fit on a multiprocessor of 228 or 164 KB
constexpr int kThreads = kWarps * 32;
constexpr int kFetchRows = 3, kFetchTurns = 5;  // a piece of the samples: a hop of 160 makes a tile one piece
static_assert(kFetchRows == kFrames / kWarps + 1);

// Where the powers of a column's output j lie, in tiles of one bin.
constexpr MATPAC_HD int place_of(int column, int j) { return column * kColumnPoints + j; }

// Arithmetic on one float a lane.
struct Lane {
  using Scalar = float;
  using Value = float;
  static MATPAC_HD float set(float x) { return x; }
  static MATPAC_HD float fma(float a, float b, float c) { return fmaf(a, b, c); }
  static MATPAC_HD float fnma(float a, float b, float c) { return fmaf(-a, b, c); }
  static MATPAC_HD float fms(float a, float b, float c) { return fmaf(a, b, -c); }
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)), for a normal number
  static MATPAC_HD void split(float x, float& e, float& m) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
    bits -= int32_t(uint32_t(exponent) << 23);
    memcpy(&m, &bits, sizeof(bits));
    e = float(exponent);
  }
  // Of a number in [sqrt(1/2), sqrt(2)). __log2f would also prepare for subnormal ones: three instructions for one.
  static MATPAC_HD float log2(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return log2f(x);
#endif
  }
};

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit MATPAC_HD BFloat16(float x) : bits(bfloat16_bits(x)) {}
};

// What the host works out for a launch.
struct Plan {
  LogMelArgs args;
  LogNormaliser normaliser;
  uint32_t tiles_per_clip, tiles;
  int last_frames;  // of a clip's last tile
  int hop;
  int pitch;  // odd, so that the lanes' samples lie in different banks
  int column_pieces, pieces;
  float log_offset, mean, inverse_std;

  explicit Plan(const LogMelArgs& a) : args(a), normaliser(a.mean, a.std) {
    const int64_t per_clip = (a.frames + kFrames - 1) / kFrames;
    if (a.batch > INT32_MAX / per_clip) throw std::invalid_argument("log_mel: the wave is too long for one launch");
    tiles_per_clip = uint32_t(per_clip);
    tiles = uint32_t(a.batch * per_clip);
    last_frames = int(a.frames - (per_clip - 1) * kFrames);
    if (a.hop > kSize) throw std::invalid_argument("log_mel: on CUDA the hop is a window of 400 samples at most");
    hop = int(a.hop);
    pitch = hop | 1;
    const auto parts = [](int n, int size) { return (n + size - 1) / size; };
    column_pieces = parts(hop, kFetchTurns * kFrames);
    pieces = parts(sample_rows(), kFetchRows * kWarps) * column_pieces;
    log_offset = float(a.log_offset), mean = float(a.mean), inverse_std = float(1 / a.std);
  }
  // The first tile of a block; it takes all before the next block's.
  MATPAC_HD uint32_t first_tile(uint32_t block, uint32_t blocks) const {
    return uint32_t(uint64_t(tiles) * block / blocks);
  }
  int sample_rows() const { return kFrames + (kSize - 1) / hop; }
  // Floats that the samples and, later, the powers take.
  int sample_floats() const {
    const int samples = sample_rows() * pitch;
    const int powers = kColumns * kColumnPoints * kFrames;
    return samples > powers ? samples : powers;
  }
  int shared_bytes() const;
};

// A table of a block, filled once: how a row takes a sample, two samples a load.
struct Tap {
  float window;
  int32_t offset;  // from the frame's first sample, in bytes: one addition a sample
};
struct alignas(16) Taps {
  Tap pair[2];
};
constexpr int kTaps = (kRowPoints + 1) / 2;  // a row's

struct Shared {
  Taps* taps;       // [b][a / 2]
  float* spectrum;  // [b][i][frame]
  float* samples;   // sample q * hop + r of frame f at (f + q) * pitch + r; then the powers [column][j][frame]

  explicit MATPAC_HD Shared(void* memory) {
    taps = static_cast<Taps*>(memory);
    spectrum = reinterpret_cast<float*>(taps + kRows * kTaps);
    samples = spectrum + kRows * kRowPoints * kFrames;
  }
};

inline int Plan::shared_bytes() const {
  return int(kRows * kTaps * sizeof(Taps) + sizeof(float) * (kRows * kRowPoints * kFrames + sample_floats()));
}

// One tile of the wave. A block takes some that follow each other: the next one is found without a division.
struct Tile {
  uint32_t clip, in_clip;

  MATPAC_HD Tile(const Plan& plan, uint32_t index) {
    clip = index / plan.tiles_per_clip;
    in_clip = index - clip * plan.tiles_per_clip;
  }
  MATPAC_HD Tile next(const Plan& plan) const {
    Tile next = *this;
    if (++next.in_clip == plan.tiles_per_clip) next.in_clip = 0, ++next.clip;
    return next;
  }
  MATPAC_HD int64_t first() const { return int64_t(in_clip) * kFrames; }  // frame
  MATPAC_HD int frames(const Plan& plan) const {
    return in_clip + 1 == plan.tiles_per_clip ? plan.last_frames : kFrames;
  }
};

MATPAC_HD void fill_tables(const Plan& plan, const Shared& shared, int thread) {
  const double scale = plan.args.wave_dtype == DType::int16 ? 1.0 / 32768 : 1.0;
  for (int i = thread; i < kSize; i += kThreads) {
    const int b = i / kRowPoints, a = i - b * kRowPoints, n = sample_of(b, a), q = n / plan.hop;
    Tap& tap = shared.taps[b * kTaps + a / 2].pair[a % 2];
    tap.window = float(plan.args.window[n] * scale);
    tap.offset = int(sizeof(float)) * (q * plan.pitch + (n - q * plan.hop));
  }
}

// A thread's samples of a piece on their way: a warp takes rows of `hop` samples, so that addresses within one differ
// by constants alone. Calls each(row, turn, sample, place) for those that the tile has: where a sample is in the tile's
// wave and where it goes.
template <typename In>
struct Samples {
  In at[kFetchRows][kFetchTurns];
};

template <typename Fn>
MATPAC_HD void each_sample(const Plan& plan, const Tile& tile, int thread, int piece, const Fn& each) {
  constexpr int kHop = kFetchTurns * kFrames, kPitch = kHop | 1;
  const int warp = thread / kFrames, lane = thread % kFrames, frames = tile.frames(plan);
  if (plan.hop == kHop && frames == kFrames) {  // as nearly always: all distances are known to the compiler
    constexpr int kWhole = kFrames / kWarps;    // rows of a warp that are there to their end
    MATPAC_UNROLL
    for (int i = 0; i <= kWhole; ++i) {
      const int row = warp + i * kWarps, end = (kFrames - 1) * kHop + kSize - row * kHop;
      if (i == kWhole && end <= 0) return;
      MATPAC_UNROLL
      for (int j = 0; j < kFetchTurns; ++j) {
        const int column = lane + j * kFrames;
        if (i < kWhole || column < end) each(i, j, row * kHop + column, row * kPitch + column);
      }
    }
    return;
  }
  const int first_row = piece / plan.column_pieces * kFetchRows * kWarps + warp;
  const int column = piece % plan.column_pieces * kHop + lane;
  const int span = (frames - 1) * plan.hop + kSize;
  MATPAC_UNROLL
  for (int i = 0; i < kFetchRows; ++i) {
    const int row = first_row + i * kWarps, in_tile = span - row * plan.hop;
    const int left = (in_tile < plan.hop ? in_tile : plan.hop) - column;
    if (left <= 0) continue;
    const int sample = row * plan.hop + column, place = row * plan.pitch + column;
    MATPAC_UNROLL
    for (int j = 0; j < kFetchTurns; ++j) {
      if (j * kFrames < left) each(i, j, sample + j * kFrames, place + j * kFrames);
    }
  }
}

template <typename In>
MATPAC_HD void fetch(const Plan& plan, const Tile& tile, int thread, int piece, Samples<In>& samples) {
  const In* wave = static_cast<const In*>(plan.args.wave) + tile.clip * plan.args.stride + tile.first() * plan.args.hop;
  each_sample(plan, tile, thread, piece, [&](int i, int j, int sample, int) { samples.at[i][j] = wave[sample]; });
}

template <typename In>
MATPAC_HD void put(const Plan& plan, const Shared& shared, const Tile& tile, int thread, int piece,
                   const Samples<In>& samples) {
  each_sample(plan, tile, thread, piece,
              [&](int i, int j, int, int place) { shared.samples[place] = float(samples.at[i][j]); });
}

// All of a tile's samples, the first piece of which has been fetched.
template <typename In>
MATPAC_HD void put_all(const Plan& plan, const Shared& shared, const Tile& tile, int thread, Samples<In>& samples) {
  put(plan, shared, tile, thread, 0, samples);
  MATPAC_NO_UNROLL
  for (int piece = 1; piece < plan.pieces; ++piece) {
    fetch(plan, tile, thread, piece, samples);
    put(plan, shared, tile, thread, piece, samples);
  }
}

// A warp has a row, or a column, or none.
static_assert(kWarps == kRows && kWarps >= kColumns);

MATPAC_HD void rows(const Plan& plan, const Shared& shared, int thread) {
  const int lane = thread % kFrames, b = thread / kFrames;
  const char* samples = reinterpret_cast<const char*>(shared.samples + lane * plan.pitch);
  const Taps* taps = shared.taps + b * kTaps;
  float* out = shared.spectrum + b * kRowPoints * kFrames + lane;
  row<Lane>(
      [=](int a) {
        const Taps two = taps[a / 2];
        const Tap& tap = two.pair[a % 2];
        return *reinterpret_cast<const float*>(samples + tap.offset) * tap.window;
      },
      [=](int i, float value) { out[i * kFrames] = value; });
}

MATPAC_HD void columns(const Shared& shared, int thread) {
  const int lane = thread % kFrames, c = thread / kFrames;
  if (c >= kColumns) return;
  const float* spectrum = shared.spectrum + lane;
  float* powers = shared.samples + place_of(c, 0) * kFrames + lane;
  const auto entry = [=](int b, int i) { return spectrum[(b * kRowPoints + i) * kFrames]; };
  const auto put = [=](int j, float value) { powers[j * kFrames] = value; };
  if (c == 0) {
    column_real<Lane>([=](int b) { return entry(b, 0); }, put);
  } else {
    column<Lane>([=](int b) { return entry(b, 2 * c - 1); }, [=](int b) { return entry(b, 2 * c); }, put);
  }
}

// Bins of a mel come in fours, as many for the four mels of a warp: one load brings four weights, one where the bins'
// powers are, one a bin's powers of four frames.
constexpr int kFour = 4;
struct alignas(8) Band {
  int32_t fours, first;  // how many, and where they begin
};
struct alignas(16) Four {
  float at[kFour];
};
struct Bins {
  Four weights;
  alignas(16) int32_t places[kFour];  // place_of
};

// kWide values a store.
template <int kWide, typename Out>
MATPAC_HD void store(Out* to, const float* from, int left) {
  struct alignas(sizeof(Out) * kWide) Wide {
    Out at[kWide];
  };
  MATPAC_UNROLL
  for (int i = 0; i < kFour; i += kWide) {
    if (i >= left) break;
    Wide wide;
    MATPAC_UNROLL
    for (int j = 0; j < kWide; ++j) wide.at[j] = Out(from[i + j]);
    *reinterpret_cast<Wide*>(to + i) = wide;
  }
}

template <typename Out>
MATPAC_HD void mels(const Plan& plan, const Shared& shared, const Tile& tile, int thread) {
  const LogMelArgs& args = plan.args;
  const int lane = thread % kFrames, frame = lane % (kFrames / kFour) * kFour, left = tile.frames(plan) - frame;
  if (left <= 0) return;
  const float* powers = shared.samples + frame;
  const Bins* all_bins = static_cast<const Bins*>(args.weights);
  const Band* bands = reinterpret_cast<const Band*>(args.bands);
  const int first = thread / kFrames * kFour + lane / (kFrames / kFour);
  Out* out =
      static_cast<Out*>(args.out) + (int64_t(tile.clip) * args.n_mels + first) * args.frames + tile.first() + frame;
  MATPAC_NO_UNROLL
  for (int m = first; m < args.n_mels; m += kWarps * kFour, out += kWarps * kFour * args.frames) {
    const Band band = bands[m];
    const Bins* bins = all_bins + band.first;
    float mel[kFour];
    MATPAC_UNROLL
    for (int i = 0; i < kFour; ++i) mel[i] = plan.log_offset;
    MATPAC_NO_UNROLL
    for (int fours = band.fours; fours > 0; --fours, ++bins) {
      const Bins four = *bins;
      MATPAC_UNROLL
      for (int j = 0; j < kFour; ++j) {
        const Four p = *reinterpret_cast<const Four*>(powers + four.places[j] * kFrames);
        MATPAC_UNROLL
        for (int i = 0; i < kFour; ++i) mel[i] = Lane::fma(p.at[i], four.weights.at[j], mel[i]);
      }
    }
    float y[kFour];
    bool normal = true;
    MATPAC_UNROLL
    for (int i = 0; i < kFour; ++i) {
      y[i] = plan.normaliser.by_log2<Lane>(mel[i]);
      normal &= mel[i] >= 0x1p-126f && mel[i] <= 0x1.fffffep127f;
    }
    // Zero, subnormal, infinite or NaN: not for the formula of the normaliser.
    if (!normal) {
      MATPAC_UNROLL
      for (int i = 0; i < kFour; ++i) {
        if (!(mel[i] >= 0x1p-126f && mel[i] <= 0x1.fffffep127f)) y[i] = (logf(mel[i]) - plan.mean) * plan.inverse_std;
      }
    }
    // A row of the result begins where its number of frames puts it.
    if (args.frames % 4 == 0) {
      store<4>(out, y, left);
    } else if (args.frames % 2 == 0) {
      store<2>(out, y, left);
    } else {
      store<1>(out, y, left);
    }
  }
}

}  // namespace matpac::log_mel_block
