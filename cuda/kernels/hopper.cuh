// PTX of sm_90 and newer: clusters of CTAs, register reallocation, stmatrix. common.cuh has the barriers and copies.
#pragma once
#include "common.cuh"

// Arrives at the barrier at the same address in another CTA of the cluster. The arrival frees a buffer and publishes no data, so that the
// default scope suffices. Cluster scope would flush L1 each time.
DEVICE void mbarrier_arrive_at(u32 barrier, u32 cta) {
  asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(cta) : "memory");
}

// Arrives once all cp.async of this thread so far are in shared memory.
DEVICE void mbarrier_arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// bulk_copy to the same address in every CTA of the mask. Each CTA's own barrier counts the bytes.
DEVICE void bulk_copy_multicast(u32 shared, const void* global, u32 bytes, u32 barrier, u16 ctas) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier), "h"(ctas) : "memory");
}

// The driver's description of a tensor in memory, for the copy engine.
struct __align__(64) TensorMap { u64 words[16]; };

// Stores a box from shared memory to the map's tensor, at (column, row). The part outside the tensor is not stored.
DEVICE void bulk_store_box(const TensorMap* map, int column, int row, u32 shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\ncp.async.bulk.commit_group;"
                 ::"l"(map), "r"(column), "r"(row), "r"(shared) : "memory");
}

// Loads such a box to shared memory, where the barrier counts its bytes; the part outside the tensor becomes zeros, which count too.
DEVICE void bulk_load_box(u32 shared, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Brings such a box to L2.
DEVICE void bulk_prefetch_box(const TensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}

// Waits until this thread's bulk stores have read their shared memory.
DEVICE void bulk_stores_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

DEVICE u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The barrier of all threads of the cluster, in two steps. Writes before the arrival are visible to the others after the wait.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// An arrival that publishes only new mbarriers, which are already fenced. A releasing arrival would wait for all stores.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }

// Move registers between the warpgroups of a CTA; the count is per thread. `inc` waits until other warpgroups have released enough.
template <int registers> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }

// The cluster address of this address in another CTA of the cluster.
DEVICE u32 cluster_address(u32 shared, u32 cta) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(cta));
  return remote;
}

DEVICE float load_remote_float(u32 remote) {
  float f;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(remote) : "memory");
  return f;
}

DEVICE float4 load_remote_float4(u32 remote) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(remote) : "memory");
  return v;
}

// Stores 4 or 16 bytes to another CTA, whose barrier counts them. Both addresses come from cluster_address.
DEVICE void store_async(u32 remote, float v, u32 remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
               ::"r"(remote), "f"(v), "r"(remote_barrier) : "memory");
}

DEVICE void store_async(u32 remote, float4 v, u32 remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(remote), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(remote_barrier) : "memory");
}

DEVICE void store_async(u32 remote, int4 v, u32 remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(remote), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(remote_barrier) : "memory");
}

// Stores four 8 x 8 matrices of 16-bit elements, transposed. Lane 8 i + r has the address of row r of matrix i.
DEVICE void stmatrix4_transposed(u32 address, const u32* d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}
