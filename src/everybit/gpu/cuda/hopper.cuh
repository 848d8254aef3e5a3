// What sm_90a has beyond machine.cuh: bulk copies counted by barriers in shared memory, and warp-group products.
#pragma once

// A barrier in shared memory. A phase ends when `count` threads have arrived and all expected bytes have landed.
struct Barrier {
  u64 state;
  __device__ __forceinline__ void init(u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(count));
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
  }
  // One thread: starts the copy of `bytes` (a multiple of 16) and arrives.
  __device__ __forceinline__ void copy(void* to, const void* from, u32 bytes) {
    const u32 at = shared_address(&state);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(at)
                 : "memory");
  }
  __device__ __forceinline__ void wait(u32 parity) {  // until the phase of this parity has ended
    asm volatile(
        "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::
            "r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Some of a block's threads, by the number of a hardware barrier (0 is __syncthreads).
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Products run on while the warps go on. Operands written by other instructions need products_fence() before.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>  // groups that may still run
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Rows of 128 bytes, swizzled: 16-byte unit u of row r lies at unit u ^ (r % 8). The start is a multiple of 1,024 bytes
// plus 32 for each step of 16 columns. PTX manual, "matrix descriptor": byte offset 1,024 between eights of rows.
__device__ __forceinline__ u64 swizzled_rows(const void* start) {
  return u64((shared_address(start) & 0x3ffff) >> 4) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62;
}

// Four 8x8 matrices of 16-bit numbers, held as mma fragments, stored transposed: lane 8m + r names row r of the m-th.
__device__ __forceinline__ void store_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

template <class T>
struct Products;  // Products<T>::times<TOKENS>: everybit/gpu/compile.py writes them, one instruction has 134 operands
