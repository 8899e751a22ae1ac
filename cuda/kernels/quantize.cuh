// What the kernels that quantize are made of: PTX by name, 16-bit numbers, and the branch's image.
// HALF=1: x is fp16, else bf16.
#pragma once
#include "common.cuh"

// --- Numbers ---------------------------------------------------------------------------------------------------------

// The two 16-bit numbers of a word as floats.
__device__ __forceinline__ float low_float(u32 word) {
#if HALF
    float f;
    asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %1;\ncvt.f32.f16 %0, lo;\n}" : "=f"(f) : "r"(word));
    return f;
#else
    return __uint_as_float(word << 16);
#endif
}

__device__ __forceinline__ float high_float(u32 word) {
#if HALF
    return low_float(word >> 16);
#else
    return __uint_as_float(word & 0xffff0000u);
#endif
}

// Which of the two it takes differs from lane to lane: `high` is 0 or 1.
__device__ __forceinline__ float either_float(u32 word, u32 high) {
#if HALF
    return low_float(word >> (16 * high));
#else
    return __uint_as_float(__byte_perm(word, 0, high ? 0x3244 : 0x1044));
#endif
}

// max(a, |b|), NaN if one of them is: a NaN in x has to reach the scale. (fmaxf would drop it.)
__device__ __forceinline__ float max_abs(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float m;
    asm("{\n.reg .f32 t;\nabs.f32 t, %2;\nmax.NaN.f32 %0, %1, t;\n}" : "=f"(m) : "f"(a), "f"(b));
    return m;
#else
    // Of numbers without a sign, the bits are in the order of the values, and NaNs come last.
    return __int_as_float(max(__float_as_int(a), __float_as_int(b) & 0x7fffffff));
#endif
}

// 1 / a to one unit in the last place. The operator / would bring a CALL for the rare cases.
__device__ __forceinline__ float reciprocal(float a) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}

// Is it neither Inf nor NaN? (a >= 0)
__device__ __forceinline__ bool finite(float a) { return a < __int_as_float(0x7f800000); }

// --- Data movement ---------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, or 16 zeros.
__device__ __forceinline__ void copy_async(u32 target, const void* source, bool there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(there ? 16 : 0) : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (there) v = *(const uint4*)source;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

__device__ __forceinline__ void copies_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups of copies are still under way.
template <int pending> __device__ __forceinline__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_float(u32 address, float f) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(f) : "memory"); }

// The next kernel may begin to start, if it was launched so; it still waits for this one's end before it reads what this one writes. Its
// weights it may read at once: that the kernels before this one have ended, this one has waited for.
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// value += eight floats that begin at a multiple of 16 bytes.
__device__ __forceinline__ void add_eight(float (&value)[8], const float* from) {
    const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    value[0] += a.x, value[1] += a.y, value[2] += a.z, value[3] += a.w;
    value[4] += b.x, value[5] += b.y, value[6] += b.z, value[7] += b.w;
}

// A row's sums of the branch into its image: `piece` of PIECES neighbouring lanes, which have 8 ranks each. fp16's are scaled down to
// stay below 2^14, bf16 has float's range.
template <int PIECES>
__device__ __forceinline__ void store_low(const float (&value)[8], int piece, int row, bool there, int M, int padded, u16* image,
                                          float* low_scale) {
    float scale = 1, inverse = 1;
#if HALF
    float peak = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) peak = max_abs(peak, value[i]);
    peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 1));
    peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 2));
    if (PIECES > 4) peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 4));
    if (peak >= 16384 && finite(peak)) {
        const int exponent = (__float_as_int(peak) >> 23) - 13;
        scale = __int_as_float(exponent << 23), inverse = __int_as_float((254 - exponent) << 23);
    }
#endif
    if (there) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = from_float2(value[2 * i] * inverse, value[2 * i + 1] * inverse);
        *(uint4*)(image + ((size_t)(piece >> 2) * padded + row) * 32 + (piece & 3 ^ row >> 1 & 3) * 8) =
            make_uint4(words[0], words[1], words[2], words[3]);
        if (piece == 0) low_scale[row] = row < M ? scale : 0;
    }
}

// A branch that was multiplied elsewhere: rows first, first + step, .. of the (M, R) matrix into its image. Of bf16, whose range is float's,
// low_scale is 1; fp16's has been found already. This is `thread` of the `threads` that share the work.
__device__ __forceinline__ void image_of_low(const u16* rows, u16* image, float* low_scale, int M, int padded, int R, int first, int step,
                                             int count, int thread, int threads) {
    const int pieces = (R + 31) / 32 * 4;
#pragma unroll 1
    for (int i = thread; i < count * pieces; i += threads) {
        const int row = first + i / pieces * step, piece = i % pieces;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row < M && piece * 8 < R) v = *(const uint4*)(rows + (size_t)row * R + piece * 8);
        if (!HALF && piece == 0 && row < padded) low_scale[row] = row < M;
        if (row < padded) *(uint4*)(image + ((size_t)(piece >> 2) * padded + row) * 32 + (piece & 3 ^ row >> 1 & 3) * 8) = v;
    }
}

// --- Clusters: CTAS thread blocks that read each other's shared memory ----------------------------------------------

#if CTAS > 1
#define CLUSTER __cluster_dims__(CTAS, 1, 1)
#else
#define CLUSTER
#endif

__device__ __forceinline__ void cluster_arrive() {
#if CTAS > 1
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
    __syncthreads();
#endif
}

// An arrival that shows nothing to the others: no fence, which would wait for all that this thread has stored.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if CTAS > 1
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if CTAS > 1
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The address in CTA `cta` of what lies at `address` in this one.
__device__ __forceinline__ u32 address_at(u32 address, u32 cta) {
#if CTAS > 1
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(cta));
    return there;
#else
    return address;
#endif
}

__device__ __forceinline__ float load_float_at(u32 address) {
    float f;
#if CTAS > 1
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(address) : "memory");
#else
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(address) : "memory");
#endif
    return f;
}

__device__ __forceinline__ float4 load_floats_at(u32 address) {
    float4 v;
#if CTAS > 1
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
#endif
    return v;
}

#if __CUDA_ARCH__ >= 900
// Stores 4 or 16 bytes in CTA `cta`'s shared memory, counted by the barrier at the same place there.
__device__ __forceinline__ void send_float(u32 address, float v, u32 barrier, u32 cta) {
    asm volatile("{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %3;\nmapa.shared::cluster.u32 counter, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %1, [counter];\n}"
                 ::"r"(address), "f"(v), "r"(barrier), "r"(cta) : "memory");
}

__device__ __forceinline__ void send_floats(u32 address, float4 v, u32 barrier, u32 cta) {
    asm volatile("{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %6;\nmapa.shared::cluster.u32 counter, %5, %6;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [counter];\n}"
                 ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier), "r"(cta) : "memory");
}
#endif

// --- Tensor cores ----------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16 bit, transposed; lane 8 i + r gives the address of matrix i's row r.
__device__ __forceinline__ uint4 load_transposed(u32 address) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w) : "r"(address) : "memory");
    return m;
}

// d (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
#pragma unroll
    for (int k = 0; k < 2; k++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#else
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
