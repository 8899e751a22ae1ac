// Writes into the memory of other GPUs, and the wait for theirs: the exchange of attention that several processes share
// (quant/parallel/peer_attention.py). A GPU writes rows where their reader wants them, so that neither end copies them once more.
//
//   put             q, k, v, or one tensor          -> each process's memory, then the number of puts so far into a flag there
//   wait_for_puts   waits until the flags of all processes say `count` more puts than at the last wait
//
// The CTAs of a process are those of one blockIdx.y. Each fences its writes and counts itself; the last one sets the flag, with release
// semantics, which order it behind the writes of them all. Puts through one channel run one after the other, and so do its waits.
// `stop` is in host memory: where another process has ended, its flag never comes. A stopped process writes nothing to the others' memory.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = 256, PIECES = 4;  // a thread has PIECES loads in flight
constexpr int CHANNELS = 2, RANKS = 64;   // as in cuda/put.py
constexpr u32 POLLS = 256;                // between two looks at `stop`, each of which goes to host memory

struct Control {  // at the beginning of each process's memory; 0 at first
  u32 flags[CHANNELS][RANKS];     // [of the process that wrote]: its puts so far
  u32 sent[CHANNELS][RANKS];      // [to the process]: this process's puts so far
  u32 received[CHANNELS][RANKS];  // [of the process]: puts that were waited for
  u32 done[CHANNELS][RANKS];      // [to the process]: CTAs of this put that have written
  u32 stopped;
};

struct Destination {  // of one process
  u64 address, flag;  // of its first row, and of this process's flag there
  u64 image;          // 16-byte pieces from an image's rows to the next one's, there
  u64 first_head, first_token, tokens;  // of the source
};

__device__ __forceinline__ void store_release(u64 address, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ u32 load_acquire(const u32* address) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ u32 load_volatile(const u32* address) {
  u32 value;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// All distances are in 16-byte pieces. A row is `pieces` of one head of one token of one part; there a token's parts are `part_there` apart
// and its heads side by side.
extern "C" __global__ void __launch_bounds__(THREADS) put(
    const uint4* __restrict__ q, const uint4* __restrict__ k, const uint4* __restrict__ v, const Destination* __restrict__ destinations,
    Control* control, int channel, int images, int parts, int heads, int pieces, int q_image, int q_head, int q_token, int k_image,
    int k_head, int k_token, int v_image, int v_head, int v_token, int token_there, int part_there) {
  const int rank = blockIdx.y;
  const Destination to = destinations[rank];
  if (load_volatile(&control->stopped)) return;
  const u32 tokens = (u32)to.tokens, total = images * tokens * parts * heads * pieces;
  for (u32 first = blockIdx.x * THREADS * PIECES + threadIdx.x; first < total; first += gridDim.x * THREADS * PIECES) {
    uint4 value[PIECES];
    uint4* there[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      u32 rest = first + i * THREADS;
      if (rest >= total) break;
      const u32 piece = rest % pieces, head = (rest /= pieces) % heads, part = (rest /= heads) % parts, token = (rest /= parts) % tokens,
                image = rest / tokens;
      const size_t from_image = part == 0 ? q_image : part == 1 ? k_image : v_image, from_head = part == 0 ? q_head : part == 1 ? k_head : v_head,
                   from_token = part == 0 ? q_token : part == 1 ? k_token : v_token;
      const uint4* from = part == 0 ? q : part == 1 ? k : v;
      value[i] = from[image * from_image + (to.first_head + head) * from_head + (to.first_token + token) * from_token + piece];
      there[i] = (uint4*)to.address + image * to.image + (size_t)token * token_there + part * part_there + head * pieces + piece;
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++)
      if (first + i * THREADS < total) *there[i] = value[i];
  }
  __syncthreads();
  if (threadIdx.x) return;
  __threadfence_system();
  if (atomicAdd(&control->done[channel][rank], 1) < gridDim.x - 1) return;
  __threadfence_system();
  control->done[channel][rank] = 0;
  store_release(to.flag, ++control->sent[channel][rank]);
}

extern "C" __global__ void __launch_bounds__(RANKS) wait_for_puts(Control* control, const u32* stop, int channel, int ranks, int count) {
  const int rank = threadIdx.x;
  if (rank >= ranks) return;
  const u32 expected = control->received[channel][rank] += count;
  u32 polls = 0;
  while ((int)(load_acquire(&control->flags[channel][rank]) - expected) < 0)
    if (++polls % POLLS == 0 && load_volatile(stop)) {
      control->stopped = 1;
      return;
    }
}
