// The few machine operations that the kernels need beyond plain C++. tests/gpu/emulate.h has the same for a CPU.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(16) Vec4 {
  u32 x, y, z, w;
};

// Byte n of the result is the byte of {a, b} (a the low four) that nibble n of `sel` names; needs bit 3 of nibbles
// clear.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 sel) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sel));
  return d;
}

// Bits of a where `mask` is set, else of b; a & mask | ones; a ^ (b & mask). The compiler needs two instructions for
// each.
__device__ __forceinline__ u32 select(u32 mask, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 ones) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(ones));
  return d;
}
__device__ __forceinline__ u32 flip(u32 a, u32 b, u32 mask) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x78;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}
// a >> 16, not to be joined with shifts to the left, which another unit of the machine does.
__device__ __forceinline__ u32 upper_half(u32 a) {
  u32 d = a >> 16;
  asm("" : "+r"(d));
  return d;
}

// Global to shared memory in the background, past L1; a thread may read what its own copies brought, by groups.
__device__ __forceinline__ void copy_ahead(Vec4* to, const Vec4* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to))),
               "l"(from));
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>  // groups that may still be under way
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ Vec4 load_cached(const Vec4* p) {
  Vec4 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Where `wanted`, else anything.
__device__ __forceinline__ Vec4 load_if(bool wanted, const Vec4* p) {
  Vec4 v;
  asm("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n@wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p), "r"(u32(wanted)));
  return v;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Of shared memory; in the order of barriers, which the compiler keeps for volatile statements.
template <int OFFSET>
__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(OFFSET));
  return v;
}

// The upper half of a, then the lower half of b.
__device__ __forceinline__ u32 funnel(u32 a, u32 b) { return __funnelshift_r(a, b, 16); }

// What the kernel before wrote may be read from here on; what comes earlier can overlap its end (a launch attribute).
__device__ __forceinline__ void after_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct F16 {                                                                                       // two in a register
  static __device__ __forceinline__ u32 magic_plus(u32 n) { return (0x6400u + n) * 0x00010001u; }  // 1024 + n, n < 1024
  static __device__ __forceinline__ u32 pair(float v) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return u32(h) << 16 | h;
  }
  static __device__ __forceinline__ u16 round(float v) { return u16(pair(v)); }
  static __device__ __forceinline__ u32 sub(u32 a, u32 b) {
    u32 d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ __forceinline__ u32 fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  // D[16, 8] += A[16, 16] B[16, 8], one warp; fragments as in the PTX manual, mma.m16n8k16.
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct BF16 {
  static __device__ __forceinline__ u32 magic_plus(u32 n) { return (0x4300u + n) * 0x00010001u; }  // 128 + n, n < 128
  static __device__ __forceinline__ u32 pair(float v) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return u32(h) << 16 | h;
  }
  static __device__ __forceinline__ u16 round(float v) { return u16(pair(v)); }
  static __device__ __forceinline__ u32 sub(u32 a, u32 b) {  // a * 1 - b, rounded once
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
    return d;
  }
  static __device__ __forceinline__ u32 fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
