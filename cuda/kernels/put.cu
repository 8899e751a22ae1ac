// Writes into the memory of other GPUs, and the wait for theirs: the exchange of attention that several processes share
// (quant/parallel/peer_attention.py). A GPU writes rows where their reader wants them, so that neither end copies them once more.
//
//     q, k, v, or one tensor      ->      rows in each process's memory, and then a flag there: the number of puts so far
//
// The CTAs of a process are those of one blockIdx.y. Each fences its writes and counts itself; the last one sets the flag. It then waits
// until this process's own memory has `count` more puts of that process than at the last wait. Puts through one channel run one after the
// other.
// `stop` is in host memory: where another process has ended, its flag never comes. A stopped process writes nothing to the others' memory.
//
// -D: PARTS 3: q, k and v; 1: one tensor

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = 1024, PIECES = 4;  // a thread has PIECES loads in flight
constexpr int CHANNELS = 2, RANKS = 64;    // RANKS as in cuda/put.py
constexpr u32 POLLS = 256;                 // between two looks at `stop`, each of which goes to host memory

struct Control {  // at the beginning of each process's memory; 0 at first
  u32 flags[CHANNELS][RANKS];     // [of the process that wrote]: its puts so far
  u32 sent[CHANNELS][RANKS];      // [to the process]: this process's puts so far
  u32 received[CHANNELS][RANKS];  // [of the process]: puts that were waited for
  u32 done[CHANNELS][RANKS];      // [to the process]: CTAs of this put that have written
  u32 stopped;
};
static_assert(sizeof(Control) <= 4096, "put.py's CONTROL holds it");

struct Destination {  // where one process receives its part
  u64 address, flag;  // addresses of the first row there, and of the flag that this process sets there
  u64 image;          // 16-byte pieces from an image's rows to the next one's, there
  u64 first_head, first_token, tokens;  // the part of the source that is written
};

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ void store_relaxed(u64 address, u32 value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
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

// q of part 0, k of part 1, v of part 2.
template <typename T>
__device__ __forceinline__ T of_part(int part, T q, T k, T v) { return part == 0 ? q : part == 1 ? k : v; }

// All distances are in 16-byte pieces. A row is `pieces` of one head of one token of one part; there a token's parts are `part_there` apart
// and its heads side by side.
extern "C" __global__ void __launch_bounds__(THREADS) put(
    const uint4* __restrict__ q, const uint4* __restrict__ k, const uint4* __restrict__ v, const Destination* __restrict__ destinations,
    Control* control, const u32* stop, int channel, int count, int images, int heads, int pieces, int q_image, int q_head, int q_token,
    int k_image, int k_head, int k_token, int v_image, int v_head, int v_token, int token_there, int part_there) {
  const int rank = blockIdx.y;
  const Destination to = destinations[rank];
  if (load_volatile(&control->stopped)) return;
  const u32 tokens = (u32)to.tokens, total = images * tokens * PARTS * heads * pieces;
  for (u32 first = blockIdx.x * THREADS * PIECES + threadIdx.x; first < total; first += gridDim.x * THREADS * PIECES) {
    uint4 value[PIECES];
    uint4* there[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const u32 index = first + i * THREADS;
      if (index >= total) break;
      const u32 row = index / pieces, piece = index - row * pieces, of_head = heads == 1 ? row : row / heads, head = row - of_head * heads,
                of_token = of_head / PARTS, part = of_head % PARTS, image = images == 1 ? 0 : of_token / tokens,
                token = of_token - image * tokens;
      value[i] = of_part(part, q, k, v)[image * (size_t)of_part(part, q_image, k_image, v_image) +
                                        (to.first_head + head) * of_part(part, q_head, k_head, v_head) +
                                        (to.first_token + token) * of_part(part, q_token, k_token, v_token) + piece];
      there[i] = (uint4*)to.address + image * to.image + (size_t)token * token_there + part * part_there + head * pieces + piece;
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++)
      if (first + i * THREADS < total) *there[i] = value[i];
  }
  __syncthreads();
  if (threadIdx.x) return;
  fence_system();
  if (atomicAdd(&control->done[channel][rank], 1) < gridDim.x - 1) return;
  control->done[channel][rank] = 0;
  const u32 sent = ++control->sent[channel][rank], expected = control->received[channel][rank] += count;
  fence_system();  // the other CTAs' writes, too, come before the flag
  store_relaxed(to.flag, sent);
  u32 polls = 0;
  while ((int)(load_acquire(&control->flags[channel][rank]) - expected) < 0)
    if (++polls % POLLS == 0 && load_volatile(stop)) {
      control->stopped = 1;
      return;
    }
}
