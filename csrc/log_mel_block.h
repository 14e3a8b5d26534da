// The CUDA kernel of log_mel, thread by thread, in host code too: csrc/cuda/log_mel.cu runs it on the device,
// csrc/cpu/log_mel_emulated.cpp on the host, where tests execute it block by block.
//
// A tile is 32 consecutive frames of a clip, one a lane; the warps share out the 16 rows and 13 columns of the
// transform (fft400.h) and the mels. So no lane ever meets another, every table is read by a whole warp at one address,
// and neighbouring lanes read neighbouring words. Between the steps lies a barrier:
//   load     the tile's samples, each once
//   rows     window and 25-point DFTs, samples -> spectrum
//   columns  16-point DFTs, spectrum -> powers, which take the memory of the samples
//   mels     banded mel, logarithm, normalisation, one coalesced store
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

// Arithmetic on one float a lane.
struct Lane {
  using Scalar = float;
  using Value = float;
  static MATPAC_FFT float set(float x) { return x; }
  static MATPAC_FFT float fma(float a, float b, float c) { return fmaf(a, b, c); }
  static MATPAC_FFT float fnma(float a, float b, float c) { return fmaf(-a, b, c); }
  static MATPAC_FFT float fms(float a, float b, float c) { return fmaf(a, b, -c); }
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)), for a normal number
  static MATPAC_FFT void split(float x, float& e, float& m) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
    bits -= int32_t(uint32_t(exponent) << 23);
    memcpy(&m, &bits, sizeof(bits));
    e = float(exponent);
  }
};

// bfloat16 as its bits, rounded to nearest even as torch does.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit MATPAC_FFT BFloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    bits = x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

// What the host works out for a launch.
struct Plan {
  LogMelArgs args;
  LogNormaliser normaliser;
  uint32_t tiles_per_clip, tiles;
  int hop;    // of the samples in memory: at most a window, since what lies between windows is not loaded
  int pitch;  // odd, so that the lanes' samples lie in different banks
  float log_offset, mean, inverse_std;

  explicit Plan(const LogMelArgs& a) : args(a), normaliser(a.mean, a.std) {
    const int64_t per_clip = (a.frames + kFrames - 1) / kFrames;
    if (a.batch > INT32_MAX / per_clip) throw std::invalid_argument("log_mel: the wave is too long for one launch");
    tiles_per_clip = uint32_t(per_clip);
    tiles = uint32_t(a.batch * per_clip);
    hop = a.hop < kSize ? int(a.hop) : kSize;
    pitch = hop | 1;
    log_offset = float(a.log_offset), mean = float(a.mean), inverse_std = float(1 / a.std);
  }
  // Floats that the samples and, later, the powers take.
  int sample_floats() const {
    const int samples = (kFrames + (kSize - 1) / hop) * pitch;
    const int powers = kBins * kFrames;
    return samples > powers ? samples : powers;
  }
  int shared_bytes() const;
};

// Tables of a block, filled once: how a row takes a sample, two samples a load, and where a column's powers go.
struct Tap {
  float window;
  int32_t offset;  // of the frame's first sample
};
struct alignas(16) Taps {
  Tap pair[2];
};
constexpr int kTaps = (kRowPoints + 1) / 2;  // a row's
struct alignas(16) Places {
  int32_t at[4];
};

struct Shared {
  Taps* taps;       // [b][a / 2]
  Places* places;   // [column][j / 4]
  float* spectrum;  // [b][i][frame]
  float* samples;   // sample q * hop + r of frame f at (f + q) * pitch + r; then the powers [bin][frame]

  explicit MATPAC_FFT Shared(void* memory) {
    taps = static_cast<Taps*>(memory);
    places = reinterpret_cast<Places*>(taps + kRows * kTaps);
    spectrum = reinterpret_cast<float*>(places + kColumns * 4);
    samples = spectrum + kRows * kRowPoints * kFrames;
  }
};

inline int Plan::shared_bytes() const {
  return int(kRows * kTaps * sizeof(Taps) + kColumns * 4 * sizeof(Places) +
             sizeof(float) * (kRows * kRowPoints * kFrames + sample_floats()));
}

// One tile of the wave.
struct Tile {
  int64_t clip, first;  // frame
  int frames;

  MATPAC_FFT Tile(const Plan& plan, uint32_t index) {
    const uint32_t quotient = index / plan.tiles_per_clip;
    clip = quotient;
    first = int64_t(index - quotient * plan.tiles_per_clip) * kFrames;
    const int64_t left = plan.args.frames - first;
    frames = left < kFrames ? int(left) : kFrames;
  }
};

MATPAC_FFT void fill_tables(const Plan& plan, const Shared& shared, int thread) {
  const double scale = plan.args.wave_dtype == DType::int16 ? 1.0 / 32768 : 1.0;
  for (int i = thread; i < kSize; i += kThreads) {
    const int b = i / kRowPoints, a = i - b * kRowPoints, n = sample_of(b, a), q = n / plan.hop;
    Tap& tap = shared.taps[b * kTaps + a / 2].pair[a % 2];
    tap.window = float(plan.args.window[n] * scale);
    tap.offset = q * plan.pitch + (n - q * plan.hop);
  }
  for (int i = thread; i < kColumns * 16; i += kThreads) {
    shared.places[i / 4].at[i % 4] = bin_of(i / 16, i % 16) * kFrames;
  }
}

// A warp takes a row of `hop` samples at a time, so that addresses within it differ by constants alone.
template <typename In>
MATPAC_FFT void load(const Plan& plan, const Shared& shared, const Tile& tile, int thread) {
  constexpr int kAtOnce = 5;  // reads in flight: a hop of 160 samples is one round
  const int lane = thread % kFrames, warp = thread / kFrames;
  const int64_t first = tile.clip * plan.args.stride + (tile.first + warp) * plan.args.hop + lane;
  const In* wave = static_cast<const In*>(plan.args.wave) + first;
  float* samples = shared.samples + warp * plan.pitch + lane;
  // From this lane's first sample of the row to the end of the tile.
  int left = (tile.frames - 1 - warp) * plan.hop + kSize - lane;
  for (; left > -lane; left -= kWarps * plan.hop, wave += kWarps * plan.args.hop, samples += kWarps * plan.pitch) {
    const int in_row = plan.hop - lane;
    const In* from = wave;
    float* to = samples;
    MATPAC_NO_UNROLL
    for (int n = left < in_row ? left : in_row; n > 0; n -= kAtOnce * kFrames) {
      In some[kAtOnce];
      MATPAC_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (i * kFrames < n) some[i] = from[i * kFrames];
      }
      MATPAC_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (i * kFrames < n) to[i * kFrames] = float(some[i]);
      }
      from += kAtOnce * kFrames, to += kAtOnce * kFrames;
    }
  }
}

MATPAC_FFT void rows(const Plan& plan, const Shared& shared, int thread) {
  const int lane = thread % kFrames;
  const float* samples = shared.samples + lane * plan.pitch;
  for (int b = thread / kFrames; b < kRows; b += kWarps) {
    const Taps* taps = shared.taps + b * kTaps;
    float* out = shared.spectrum + b * kRowPoints * kFrames + lane;
    row<Lane>(
        [=](int a) {
          const Taps two = taps[a / 2];
          return samples[two.pair[a % 2].offset] * two.pair[a % 2].window;
        },
        [=](int i, float value) { out[i * kFrames] = value; });
  }
}

MATPAC_FFT void columns(const Shared& shared, int thread) {
  const float* spectrum = shared.spectrum + thread % kFrames;
  float* powers = shared.samples + thread % kFrames;
  for (int c = thread / kFrames; c < kColumns; c += kWarps) {
    const auto entry = [=](int b, int i) { return spectrum[(b * kRowPoints + i) * kFrames]; };
    const Places* places = shared.places + c * 4;
    const auto put = [=](int j, float value) { powers[places[j / 4].at[j % 4]] = value; };
    if (c == 0) {
      column_real<Lane>([=](int b) { return entry(b, 0); }, put);
    } else {
      column<Lane>([=](int b) { return entry(b, 2 * c - 1); }, [=](int b) { return entry(b, 2 * c); }, put);
    }
  }
}

// Bins of a mel and its weights come in fours: the weights of all lanes are the same, and one load brings four.
struct alignas(16) Band {
  int32_t first, fours, weights, unused;
};
struct alignas(16) Weights {
  float at[4];
};

template <typename Out>
MATPAC_FFT void mels(const Plan& plan, const Shared& shared, const Tile& tile, int thread) {
  const LogMelArgs& args = plan.args;
  const int lane = thread % kFrames, warp = thread / kFrames;
  if (lane >= tile.frames) return;
  const float* powers = shared.samples + lane;
  const Weights* all_weights = static_cast<const Weights*>(args.weights);
  const Band* bands = reinterpret_cast<const Band*>(args.bands);
  Out* out = static_cast<Out*>(args.out) + (tile.clip * args.n_mels + warp) * args.frames + tile.first + lane;
  const int64_t step = kWarps * args.frames;
  MATPAC_NO_UNROLL
  for (int m = warp; m < args.n_mels; m += kWarps, out += step) {
    const Band band = bands[m];
    const float* power = powers + band.first * kFrames;
    const Weights* weights = all_weights + band.weights;
    float mel = plan.log_offset;
    MATPAC_NO_UNROLL
    for (int left = band.fours; left > 0; --left, power += 4 * kFrames, ++weights) {
      const Weights w = *weights;
      MATPAC_UNROLL
      for (int j = 0; j < 4; ++j) mel = Lane::fma(power[j * kFrames], w.at[j], mel);
    }
    float y = plan.normaliser.of<Lane>(mel);
    // Zero, subnormal, infinite or NaN: not for the formula of the normaliser.
    if (!(mel >= 0x1p-126f && mel <= 0x1.fffffep127f)) y = (logf(mel) - plan.mean) * plan.inverse_std;
    *out = Out(y);
  }
}

}  // namespace matpac::log_mel_block
