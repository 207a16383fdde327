// Quantized linear layers on x86 CPUs, for one of two instruction sets: AVX512 with VNNI and BF16 (cpu_avx512.h), AVX2 (cpu_avx2.h).
//
//   y[M, N] = x[M, K] @ w[N, K]^T + bias[N],    w[n, k] = w_q[n, k] * scale[g, n] + offset[g, n],    g = k / group
//
// linear_weight_only: x bf16, float32 or float16; float32 accumulation.
// linear_dynamic:     x ~ (x_q - x_zp) * x_scale with x_q int8; exact int32 accumulation inside a group.
//
// One loop serves all of them. A tile is MR <= 6 rows by a block of kColumns columns, four vector registers of kLanes. Its accumulators, of all
// four or of two of them at a time, stay in registers, and every step reads one piece of each row of x (broadcast) and one row of packed weights,
// decoded in registers. Where there are many rows, a kind may have a panel of weights written out once per block of rows: scaled where there are
// groups, whose scales cost a tile a multiplication per group and accumulator. What differs is in the "kinds", which AOQUANT_ISA names.
//
// Packed weights, from packing_cpu.py: [n_pad / kColumns][k_pad / KStep] rows of Decode::Bytes bytes, n_pad = round_up(N, kColumns), k_pad =
// G * group when G > 1, else round_up(K, KStep). scale and offset: [G, n_pad]. The decoders are the definition of a row. M >= 0, N >= 1, K >= 1;
// x, bias and y are not padded and nothing outside their rows is touched. A row of x with an infinity may give NaN where the exact result is
// infinite.
//
// Define AOQUANT_ISA as the name of the instruction set's header, or put its text where it is included. threads > 1 needs -fopenmp. Safe under
// -ffast-math. The text may be pasted into a source file at global scope: everything has internal linkage.
#ifndef AOQUANT_CPU_LINEAR_H
#define AOQUANT_CPU_LINEAR_H
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define AOQUANT_INLINE inline __attribute__((always_inline))

namespace aoquant {
namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int32_t word(const void* p) { int32_t v; memcpy(&v, p, 4); return v; }

#include AOQUANT_ISA

constexpr int kColumns = 4 * kLanes;
constexpr int kTileRows = 6;

// ---- the tile ----------------------------------------------------------------------------------------------------------------------------------

template <class X, class Y, class Bias> struct Linear {
  int64_t M, N, K;
  const X* x;
  int64_t ldx;
  const float* x_scale;   // [M] or null: 1
  const int32_t* x_zp;    // [M] or null: 0
  const uint8_t* w;
  const float* scale;     // [G, n_pad]
  const float* offset;    // [G, n_pad] or null: 0
  int64_t group;
  const float* w_sum;     // [n_pad], what x_zp multiplies: sum_k w_q when G = 1 (exact integers), else sum_k w_q * scale; read when x_zp is given
  const Bias* bias;       // [N] or null
  Y* y;
  int64_t ldy;

  int64_t n_pad() const { return ceil_div(N, kColumns) * kColumns; }
};

// Whether there are several groups is a type: where the caller knows, the other half is not compiled (a kernel's compile takes 2.5 s, not 3.6).
template <class L, bool Several> struct Grouped : L {
  static constexpr bool kSeveral = Several;
  int64_t groups() const { return Several ? ceil_div(this->K, this->group) : 1; }
};

// What one thread keeps of a block of rows. start: what a group's accumulators start from, which undoes the decoders' bias;
// row_sum: sum of (x - zero point) over the group, as offset multiplies it. Both are [G, rows]: the rows of a tile are neighbours.
template <class Kind> struct Block {
  const typename Kind::Staged* x;
  int64_t ldx;
  typename Kind::Sum* start;
  float* row_sum;
  int64_t rows;
};

// `steps` steps from x and w: acc[chain][m][j] += x * w for MR rows and the registers First .. First + NR - 1 of the packed rows.
template <class Kind, int MR, int First, int NR, int Chains>
AOQUANT_INLINE void run_steps(typename Kind::Acc (*acc)[MR][NR], const typename Kind::Staged* x, int64_t ldx, const uint8_t* w, int64_t steps) {
  constexpr int64_t Burst = Kind::Burst;
  const typename Kind::Decode decode;
  auto take = [&](int chain, int64_t count) __attribute__((always_inline)) {
    take_steps<Kind, MR, First, NR>(acc[chain], decode, x, ldx, w, count);
    w += count * Kind::Decode::Bytes;
    x += count * Kind::KStep;
  };
  if constexpr (Chains == 2)
    for (; steps >= 2 * Burst; steps -= 2 * Burst) take(0, Burst), take(1, Burst);
  for (; steps >= Burst; steps -= Burst) take(0, Burst);
  if (Burst > 1 && steps > 0) take(0, steps);
}

// One group: MR rows, the registers First .. First + NR - 1 of a block of columns, steps s0 .. s1 - 1; tile holds the raw accumulators.
template <class Kind, int MR, int First, int NR>
void accumulate(const Block<Kind>& blk, int64_t row, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  using Acc = typename Kind::Acc;
  constexpr int Chains = MR == 1 ? 2 : 1;  // one row alone is bound by the latency of its 4 accumulators
  Acc acc[Chains][MR][NR];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      acc[0][m][j] = s0 ? load_acc(tile + m * kColumns + (First + j) * kLanes, Acc{}) : Kind::Decode::Bias != 0 ? splat(blk.start[row + m]) : Acc{};
      if (Chains == 2) acc[Chains - 1][m][j] = Acc{};
    }
  run_steps<Kind, MR, First, NR, Chains>(acc, blk.x + row * blk.ldx + s0 * Kind::KStep, blk.ldx, w, s1 - s0);
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j)
      store_acc(tile + m * kColumns + (First + j) * kLanes, Chains == 2 ? add(acc[0][m][j], acc[Chains - 1][m][j]) : acc[0][m][j]);
}

// Several groups of a block of columns from n: tile holds sum_g scale * acc + offset * row_sum.
template <class Kind, int MR, int First, int NR, class P>
void accumulate_groups(const P& p, const Block<Kind>& blk, int64_t row, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  using Acc = typename Kind::Acc;
  constexpr int Chains = MR == 1 ? 2 : 1;
  const int64_t n_pad = p.n_pad(), group_steps = p.group / Kind::KStep;
  Floats out[MR][NR];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) out[m][j] = s0 ? load(tile + m * kColumns + (First + j) * kLanes) : Floats{};
  int64_t g = s0 / group_steps;
  const typename Kind::Staged* x = blk.x + row * blk.ldx + s0 * Kind::KStep;
  for (int64_t left = s1 - s0; left > 0; left -= group_steps, ++g, w += group_steps * Kind::Decode::Bytes, x += p.group) {
    Acc acc[Chains][MR][NR];
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        acc[0][m][j] = splat(blk.start[g * blk.rows + row + m]);
        if (Chains == 2) acc[Chains - 1][m][j] = Acc{};
      }
    run_steps<Kind, MR, First, NR, Chains>(acc, x, blk.ldx, w, std::min(group_steps, left));
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      const Floats sc = load(p.scale + g * n_pad + n + (First + j) * kLanes);
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) out[m][j] = fmadd(to_float(Chains == 2 ? add(acc[0][m][j], acc[Chains - 1][m][j]) : acc[0][m][j]), sc, out[m][j]);
    }
    if (p.offset)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        const Floats of = load(p.offset + g * n_pad + n + (First + j) * kLanes);
#pragma GCC unroll 6
        for (int m = 0; m < MR; ++m) out[m][j] = fmadd(splat(blk.row_sum[g * blk.rows + row + m]), of, out[m][j]);
      }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) store_acc(tile + m * kColumns + (First + j) * kLanes, out[m][j]);
}

template <class Kind, int MR, class P>
void accumulate_rows(const P& p, const Block<Kind>& blk, int64_t row, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  constexpr int One = registers(MR, false), Grouped = registers(MR, true);
  if constexpr (Kind::Decode::Bits >= 16 || !P::kSeveral) {
    accumulate<Kind, MR, 0, One>(blk, row, w, s0, s1, tile);
    if constexpr (One == 2) accumulate<Kind, MR, 2, 2>(blk, row, w, s0, s1, tile);
  } else {
    accumulate_groups<Kind, MR, 0, Grouped>(p, blk, row, n, w, s0, s1, tile);
    if constexpr (Grouped == 2) accumulate_groups<Kind, MR, 2, 2>(p, blk, row, n, w, s0, s1, tile);
  }
}

template <class Kind, class P>
void accumulate_rows(int rows, const P& p, const Block<Kind>& blk, int64_t row, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  switch (rows) {
    case 1: return accumulate_rows<Kind, 1>(p, blk, row, n, w, s0, s1, tile);
    case 2: return accumulate_rows<Kind, 2>(p, blk, row, n, w, s0, s1, tile);
    case 3: return accumulate_rows<Kind, 3>(p, blk, row, n, w, s0, s1, tile);
    case 4: return accumulate_rows<Kind, 4>(p, blk, row, n, w, s0, s1, tile);
    case 5: return accumulate_rows<Kind, 5>(p, blk, row, n, w, s0, s1, tile);
    case 6: return accumulate_rows<Kind, 6>(p, blk, row, n, w, s0, s1, tile);
  }
}

// tile -> y: the scale of the only group, the scale of x, bias, rounding.
template <class Kind, class P>
void finish(int rows, const P& p, const Block<Kind>& blk, int64_t m0, int64_t row, int64_t n, const float* tile) {
  const bool one_group = p.groups() == 1;
  for (int j = 0; j < 4; ++j) {
    const int64_t left = p.N - n - kLanes * j;
    if (left <= 0) break;
    const Floats scale = load(p.scale + n + kLanes * j);
    const Floats offset = p.offset ? load(p.offset + n + kLanes * j) : Floats{};
    const Floats w_sum = p.x_zp ? load(p.w_sum + n + kLanes * j) : Floats{};
    const Floats bias = p.bias ? load_part(p.bias + n + kLanes * j, left) : Floats{};
    for (int m = 0; m < rows; ++m) {
      const float* t = tile + m * kColumns + j * kLanes;
      const int32_t zp = p.x_zp ? p.x_zp[m0 + row + m] : 0;
      Floats v;
      if (one_group) {
        typename Kind::Acc raw = load_acc(t, typename Kind::Acc{});
        if constexpr (std::is_same<typename Kind::Sum, int32_t>::value)  // still exact
          if (p.x_zp) raw = sub(raw, mul(splat(zp), to_ints(w_sum)));
        v = mul(to_float(raw), scale);
        if (p.offset) v = fmadd(splat(blk.row_sum[row + m]), offset, v);
      } else {
        v = load(t);
        if (p.x_zp) v = fnmadd(splat((float)zp), w_sum, v);
      }
      v = p.x_scale ? fmadd(v, splat(p.x_scale[m0 + row + m]), bias) : add(v, bias);
      store_part(p.y + (m0 + row + m) * p.ldy + n + kLanes * j, left, v);
    }
  }
}

// ---- blocks and threads ------------------------------------------------------------------------------------------------------------------------

template <class To, class From> inline void stage_row(To* to, const From* x, int64_t n) {
  if constexpr (std::is_same<To, From>::value) memcpy(to, x, n * sizeof(To));
  else if constexpr (std::is_same<To, float>::value) for (int64_t k = 0; k < n; k += kLanes) store_part(to + k, n - k, load_part(x + k, n - k));
  else std::copy(x, x + n, to);
}

template <class Kind, class P> void prepare_rows(const P& p, const Block<Kind>& blk, int64_t m0, int64_t rows) {
  const int64_t G = p.groups(), group = G > 1 ? p.group : p.K;
  const bool needed = Kind::Decode::Bias != 0 || p.offset;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t g = 0; g < G; ++g) {
      const int64_t k = g * group, len = std::min(group, p.K - k);
      const typename Kind::Sum sum = needed ? Kind::sum(blk.x + m * blk.ldx + k, len) : 0;
      blk.start[g * blk.rows + m] = -Kind::Decode::Bias * sum;
      blk.row_sum[g * blk.rows + m] = (float)(p.x_zp ? sum - (typename Kind::Sum)(p.x_zp[m0 + m] * len) : sum);
    }
}

template <class Kind, class P> void linear_part(const P& p, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  if (m_begin >= m_end || n_begin >= n_end) return;
  using Staged = typename Kind::Staged;
  const int64_t G = p.groups(), steps = ceil_div(p.K, Kind::KStep), packed_steps = G > 1 ? G * p.group / Kind::KStep : steps;
  const int64_t group_steps = G > 1 ? p.group / Kind::KStep : 1;
  using Expanded = ExpandedKind<Kind>;
  const bool expands = Kind::Expands && m_end - m_begin >= kExpandRows;
  const int64_t panel_steps = expands ? kExpandedBytes / Expanded::Decode::Bytes : kPanelBytes / Kind::Decode::Bytes;
  const int64_t panel = std::max<int64_t>(1, panel_steps / group_steps) * group_steps;
  const int64_t m_block = std::min(kBlockRows, m_end - m_begin);
  // x is not padded: rows that end inside a step, or that need converting, are staged
  const bool staged = p.K % Kind::KStep || sizeof(Staged) != sizeof(typename Kind::X);
  const int64_t staged_ld = ceil_div(steps * Kind::KStep, 16) * 16;
  const int64_t tile_bytes = m_block * kColumns * (int64_t)sizeof(float), sum_bytes = ceil_div(m_block * G, 16) * 64, x_bytes = staged ? m_block * staged_ld * (int64_t)sizeof(Staged) : 0;
  const int64_t expanded_bytes = expands ? std::min(panel, packed_steps) * Expanded::Decode::Bytes : 0;
  char* scratch = (char*)_mm_malloc(tile_bytes + 2 * sum_bytes + x_bytes + expanded_bytes, 64);
  float* tiles = (float*)scratch;
  uint8_t* expanded = (uint8_t*)(scratch + tile_bytes + 2 * sum_bytes + x_bytes);
  Staged* x_staged = (Staged*)(scratch + tile_bytes + 2 * sum_bytes);
  Block<Kind> blk{nullptr, 0, (typename Kind::Sum*)(scratch + tile_bytes), (float*)(scratch + tile_bytes + sum_bytes), m_block};
  for (int64_t m0 = m_begin; m0 < m_end; m0 += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, m_end - m0), m_tiles = ceil_div(rows, kTileRows);
    if (staged) {
      for (int64_t m = 0; m < rows; ++m) {
        stage_row(x_staged + m * staged_ld, p.x + (m0 + m) * p.ldx, p.K);
        std::fill(x_staged + m * staged_ld + p.K, x_staged + (m + 1) * staged_ld, Staged{});
      }
      blk.x = x_staged, blk.ldx = staged_ld;
    } else {
      blk.x = (const Staged*)(p.x + m0 * p.ldx), blk.ldx = p.ldx;
    }
    prepare_rows<Kind>(p, blk, m0, rows);
    for (int64_t n = n_begin; n < n_end; n += kColumns)
      for (int64_t s0 = 0; s0 < steps; s0 += panel) {
        const int64_t s1 = std::min(steps, s0 + panel);
        const uint8_t* w = p.w + (n / kColumns * packed_steps + s0) * Kind::Decode::Bytes;
        for (int64_t t = 0; t < m_tiles; ++t) {  // tiles of nearly equal height
          const int64_t row = t * rows / m_tiles, height = (t + 1) * rows / m_tiles - row;
          float* tile = tiles + row * kColumns;
          if constexpr (Kind::Expands) {
            if (expands && t == 0) expand<Kind>(p, n, w, s0, s1, expanded);
            if (expands) accumulate_rows<Expanded>(height, p, Block<Expanded>{blk.x, blk.ldx, blk.start, blk.row_sum, blk.rows}, row, n, expanded, s0, s1, tile);
          }
          if (!expands) accumulate_rows<Kind>(height, p, blk, row, n, w, s0, s1, tile);
          if (s1 == steps) finish<Kind>(height, p, blk, m0, row, n, tile);
        }
      }
  }
  _mm_free(scratch);
}

template <class Kind, class P> void run(const P& p, int threads) {
  const int64_t n_blocks = ceil_div(p.N, kColumns), m_tiles = ceil_div(p.M, kTileRows);
  if (p.M <= 0 || p.N <= 0) return;
  // a grid of threads, tm by tn, with the least work for the busiest; few rows of threads when equal, since each of them reads all weights
  int tm = 1, tn = 1;
  int64_t best = INT64_MAX;
  for (int a = 1; a <= threads; ++a) {
    const int64_t work = ceil_div(m_tiles, a) * ceil_div(n_blocks, threads / a);
    if (work < best) best = work, tm = a, tn = threads / a;
  }
  auto part = [&](int i) {
    const int64_t a = i / tn, b = i % tn;
    linear_part<Kind>(p, p.M * a / tm, p.M * (a + 1) / tm, n_blocks * b / tn * kColumns, n_blocks * (b + 1) / tn * kColumns);
  };
  if (tm * tn == 1) return part(0);
#pragma omp parallel for num_threads(tm * tn) schedule(static, 1)
  for (int i = 0; i < tm * tn; ++i) part(i);
}

template <class Kind, class L> AOQUANT_INLINE void linear(const L& p, int threads) {
  if (p.group > 0 && p.group < p.K) run<Kind>(Grouped<L, true>{p}, threads);
  else run<Kind>(Grouped<L, false>{p}, threads);
}

// ---- entry points ------------------------------------------------------------------------------------------------------------------------------

// w: layout "cpu_bf16" or "cpu_fma". group: even, or >= K (or 0) for one scale per channel.
template <int Bits, class X, class Y, class Bias>
AOQUANT_INLINE void linear_weight_only(int64_t M, int64_t N, int64_t K, const X* x, int64_t ldx, const uint8_t* w, const float* scale, const float* offset,
                                       int64_t group, const Bias* bias, Y* y, int64_t ldy, int threads) {
  const Linear<X, Y, Bias> p{M, N, K, x, ldx, nullptr, nullptr, w, scale, offset, group, nullptr, bias, y, ldy};
  linear<typename WeightOnlyKind<X, Bits>::type>(p, threads);
}

// w: layout "cpu_vnni" or "cpu_madd". group: a multiple of 4, or >= K (or 0) for one scale per channel. K < 65536 within a group.
template <int Bits, class Y, class Bias>
AOQUANT_INLINE void linear_dynamic(int64_t M, int64_t N, int64_t K, const int8_t* x_q, int64_t ldx, const float* x_scale, const int32_t* x_zp,
                                   const uint8_t* w, const float* scale, const float* offset, int64_t group, const float* w_sum, const Bias* bias, Y* y,
                                   int64_t ldy, int threads) {
  const Linear<int8_t, Y, Bias> p{M, N, K, x_q, ldx, x_scale, x_zp, w, scale, offset, group, w_sum, bias, y, ldy};
  linear<DynamicKind<Bits>>(p, threads);
}

// w[N, K], of linear_weight_only with scale, offset, group -> to, int8 of linear_dynamic, whose scales are row[n_pad].
template <int Bits>
void requantize(int64_t N, int64_t K, const uint8_t* w, const float* scale, const float* offset, int64_t group, const float* row, uint8_t* to, int threads) {
  const int64_t blocks = ceil_div(N, kColumns);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks; ++i) requantize_columns<Bits>(kColumns * i, kColumns * blocks, K, w, scale, offset, group, row, to);
}

}  // namespace
}  // namespace aoquant

#undef AOQUANT_INLINE
#endif  // AOQUANT_CPU_LINEAR_H
