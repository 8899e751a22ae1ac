// Hopper's warpgroup MMA with A in registers: D (64 x TOKENS) += A (64 x k) B (k x TOKENS), B in shared memory, K-major and swizzled.
// A warpgroup's lane g * 4 + q of warp w holds rows 16 w + g and + 8; register 4 j + e of D is token
// 8 j + 2 q + (e & 1), row g + 8 (e >> 1).
#pragma once
#include "common.cuh"

#if HALF
#define HALF_TYPE "f16"
#else
#define HALF_TYPE "bf16"
#endif

#define WGMMA_D_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_D0 \
  WGMMA_D_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D1 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D2 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_D3 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_R4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define WGMMA_R16(c, d, i) WGMMA_R4(c, d, i), WGMMA_R4(c, d, i + 4), WGMMA_R4(c, d, i + 8), WGMMA_R4(c, d, i + 12)
#define WGMMA_R32(c, d, i) WGMMA_R16(c, d, i), WGMMA_R16(c, d, i + 16)

#if TOKENS == 64
#define WGMMA_D WGMMA_D0
#define WGMMA_REGISTERS(c, d) WGMMA_R32(c, d, 0)
#define WGMMA_SHAPE(k) "m64n64k" k
#define WGMMA_IN "{%32, %33, %34, %35}, %36"
#elif TOKENS == 128
#define WGMMA_D WGMMA_D0 ", " WGMMA_D1
#define WGMMA_REGISTERS(c, d) WGMMA_R32(c, d, 0), WGMMA_R32(c, d, 32)
#define WGMMA_SHAPE(k) "m64n128k" k
#define WGMMA_IN "{%64, %65, %66, %67}, %68"
#elif TOKENS == 192
#define WGMMA_D WGMMA_D0 ", " WGMMA_D1 ", " WGMMA_D2
#define WGMMA_REGISTERS(c, d) WGMMA_R32(c, d, 0), WGMMA_R32(c, d, 32), WGMMA_R32(c, d, 64)
#define WGMMA_SHAPE(k) "m64n192k" k
#define WGMMA_IN "{%96, %97, %98, %99}, %100"
#elif TOKENS == 256
#define WGMMA_D WGMMA_D0 ", " WGMMA_D1 ", " WGMMA_D2 ", " WGMMA_D3
#define WGMMA_REGISTERS(c, d) WGMMA_R32(c, d, 0), WGMMA_R32(c, d, 32), WGMMA_R32(c, d, 64), WGMMA_R32(c, d, 96)
#define WGMMA_SHAPE(k) "m64n256k" k
#define WGMMA_IN "{%128, %129, %130, %131}, %132"
#else
#error "TOKENS is 64, 128, 192 or 256"
#endif
#define WGMMA_INT(x) "+r"(x)
#define WGMMA_FLOAT(x) "+f"(x)

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the committed groups are still running.
template <int pending> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The descriptor of rows of 128 or 64 bytes in shared memory at `address`, swizzled over that width, in consecutive atoms of 8 rows.
template <int row_bytes> DEVICE u64 wgmma_descriptor(u32 address) {
  const u64 swizzle = row_bytes == 128 ? 1 : 2, atom = 8 * row_bytes;
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (atom >> 4) << 32 | swizzle << 62;
}

DEVICE void wgmma_s8(int (&d)[TOKENS / 2], const u32 (&a)[4], u64 b) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned." WGMMA_SHAPE("32") ".s32.s8.s8 {" WGMMA_D "}, " WGMMA_IN ", p;\n}"
                 : WGMMA_REGISTERS(WGMMA_INT, d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// D (64 x 32, or 64 x 64) += A (64 x 16) B (16 x 32), 16 bit, both in shared memory.
DEVICE void wgmma_half(float (&d)[16], u64 a, u64 b) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32." HALF_TYPE "." HALF_TYPE " {" WGMMA_D_16 "}, %16, %17, p, 1, 1, 0, 0;\n}"
                 : WGMMA_R16(WGMMA_FLOAT, d, 0)
                 : "l"(a), "l"(b));
}
DEVICE void wgmma_half(float (&d)[32], u64 a, u64 b) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF_TYPE "." HALF_TYPE " {" WGMMA_D0 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : WGMMA_R32(WGMMA_FLOAT, d, 0)
                 : "l"(a), "l"(b));
}
