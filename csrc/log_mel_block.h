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
  int step_rows, step_rest;  // kThreads samples on, in rows of `hop` and a rest
  float log_offset, mean, std;

  explicit Plan(const LogMelArgs& a) : args(a), normaliser(a.mean, a.std) {
    const int64_t per_clip = (a.frames + kFrames - 1) / kFrames;
    if (a.batch > INT32_MAX / per_clip) throw std::invalid_argument("log_mel: the wave is too long for one launch");
    tiles_per_clip = uint32_t(per_clip);
    tiles = uint32_t(a.batch * per_clip);
    hop = a.hop < kSize ? int(a.hop) : kSize;
    pitch = hop | 1;
    step_rows = kThreads / hop;
    step_rest = kThreads % hop;
    log_offset = float(a.log_offset), mean = float(a.mean), std = float(a.std);
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

template <typename In>
MATPAC_FFT void load(const Plan& plan, const Shared& shared, const Tile& tile, int thread) {
  const In* wave = static_cast<const In*>(plan.args.wave) + tile.clip * plan.args.stride + tile.first * plan.args.hop;
  const int count = (tile.frames - 1) * plan.hop + kSize;
  int q = thread / plan.hop, r = thread - q * plan.hop;
  for (int i = thread; i < count; i += kThreads) {
    shared.samples[q * plan.pitch + r] = float(wave[q * plan.args.hop + r]);
    q += plan.step_rows, r += plan.step_rest;
    if (r >= plan.hop) r -= plan.hop, ++q;
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

template <typename Out>
MATPAC_FFT void mels(const Plan& plan, const Shared& shared, const Tile& tile, int thread) {
  const LogMelArgs& args = plan.args;
  const int lane = thread % kFrames;
  if (lane >= tile.frames) return;
  Out* out = static_cast<Out*>(args.out) + tile.clip * args.n_mels * args.frames + tile.first + lane;
  const float* weights = static_cast<const float*>(args.weights);
  for (int m = thread / kFrames; m < args.n_mels; m += kWarps) {
    const int32_t* band = args.bands + 3 * m;
    const float* power = shared.samples + band[0] * kFrames + lane;
    const float* weight = weights + band[2];
    float mel = plan.log_offset;
    for (int j = 0; j < band[1]; ++j) mel = Lane::fma(power[j * kFrames], weight[j], mel);
    float y = plan.normaliser.of<Lane>(mel);
    // Zero, subnormal, infinite or NaN: not for the formula of the normaliser.
    if (!(mel >= 0x1p-126f && mel <= 0x1.fffffep127f)) y = (logf(mel) - plan.mean) / plan.std;
    out[m * args.frames] = Out(y);
  }
}

}  // namespace matpac::log_mel_block
