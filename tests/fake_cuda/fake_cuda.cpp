// A CUDA device that computes nothing: libcuda, libcudart, cuBLAS, cuBLASLt and cuFFT in one preloaded library.
//
// PyTorch's CUDA build and Triton run on it without a GPU, a driver or a CUDA toolkit. Their own code is the real one:
// PyTorch's dispatcher, caching allocator, CUDA graphs and set_sync_debug_mode; Triton's compiler (real cubins) and
// launcher. This library takes the calls at the bottom. It counts kernels and does not run them.
//
// Exact: launches and their names, waits for the device, copies by kind of memory, device memory in use, calls that are
// not allowed during stream capture, errors of dtype, shape and device, and the host's time without the driver's.
//
// Limits:
//   - Values are those of memory that nobody wrote: zeros, or what an earlier owner of the block copied into it.
//     Copies between host and device are real. Copies within the device above 64 KiB and memsets above 1 MiB are not,
//     so that large blocks never become resident memory.
//   - A call of cuBLAS, cuBLASLt or cuFFT counts as one launch. The real libraries may launch several kernels.
//   - A call that is not allowed during capture is counted and succeeds. A real driver returns an error.
//   - A capture is of one stream. Work that is forked to a second stream is counted as not allowed.
//   - cuDNN, cuSOLVER, cuSPARSE, cuRAND's host interface and NCCL are not replaced. What is missing here reaches the
//     real library, which finds no driver.
//   - The layouts of structures are those of CUDA 13. Only x86-64 Linux was tried.
//
// Functions are declared here with plain types and without CUDA's headers, which are not all in the pip wheels. Handles,
// enums and device pointers are void*, int and uint64_t. Functions that ignore their arguments declare none, which the
// System V calling convention allows.
//
// Build: g++ -std=c++17 -O1 -fPIC -shared fake_cuda.cpp -o libcuda.so.1 -Wl,-soname,libcuda.so.1

#include <cxxabi.h>
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's types: values and layouts that matter, as in the headers of CUDA 13.0
// ---------------------------------------------------------------------------------------------------------------------

using Status = int;  // cudaError_t, CUresult, cublasStatus_t, cufftResult: 0 is success in all of them
using Stream = void*;
using Size = unsigned long long;

constexpr Status SUCCESS = 0;
constexpr Status INVALID_VALUE = 1;
constexpr Status OUT_OF_MEMORY = 2;
constexpr Status INVALID_CONFIGURATION = 9;
constexpr Status INVALID_DEVICE = 101;

enum CaptureMode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Dim3 {
  unsigned x, y, z;
};

struct DeviceProperties {  // cudaDeviceProp
  char name[256];
  char uuid[16];
  char luid[8];
  unsigned luid_mask;
  size_t totalGlobalMem;
  size_t sharedMemPerBlock;
  int regsPerBlock;
  int warpSize;
  size_t memPitch;
  int maxThreadsPerBlock;
  int maxThreadsDim[3];
  int maxGridSize[3];
  size_t totalConstMem;
  int major;
  int minor;
  size_t textureAlignment;
  size_t texturePitchAlignment;
  int multiProcessorCount;
  int integrated;
  int canMapHostMemory;
  int textures_and_surfaces[38];
  size_t surfaceAlignment;
  int concurrentKernels;
  int ECCEnabled;
  int pci[3];
  int tccDriver;
  int asyncEngineCount;
  int unifiedAddressing;
  int memoryBusWidth;
  int l2CacheSize;
  int persistingL2CacheMaxSize;
  int maxThreadsPerMultiProcessor;
  int streamPrioritiesSupported;
  int caches[2];
  size_t sharedMemPerMultiprocessor;
  int regsPerMultiprocessor;
  int features[9];
  size_t sharedMemPerBlockOptin;
  int host_access[2];
  int maxBlocksPerMultiProcessor;
  int rest[79];
};
static_assert(sizeof(DeviceProperties) == 1008);
static_assert(offsetof(DeviceProperties, totalGlobalMem) == 288);
static_assert(offsetof(DeviceProperties, maxThreadsPerBlock) == 320);
static_assert(offsetof(DeviceProperties, major) == 360);
static_assert(offsetof(DeviceProperties, multiProcessorCount) == 384);
static_assert(offsetof(DeviceProperties, concurrentKernels) == 560);
static_assert(offsetof(DeviceProperties, unifiedAddressing) == 588);
static_assert(offsetof(DeviceProperties, l2CacheSize) == 596);
static_assert(offsetof(DeviceProperties, sharedMemPerMultiprocessor) == 624);
static_assert(offsetof(DeviceProperties, sharedMemPerBlockOptin) == 672);
static_assert(offsetof(DeviceProperties, maxBlocksPerMultiProcessor) == 688);

struct PointerAttributes {  // cudaPointerAttributes
  int type;                 // 0 unknown to CUDA, 1 pinned, 2 device
  int device;
  void* devicePointer;
  void* hostPointer;
  long reserved[8];
};
static_assert(sizeof(PointerAttributes) == 88);

struct LaunchConfiguration {  // cudaLaunchConfig_t, and CUlaunchConfig up to padding
  Dim3 grid;
  Dim3 block;
  union {
    size_t dynamicSmemBytes;
    unsigned sharedMemBytes;
  };
  Stream stream;
  void* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchConfiguration) == 56);
static_assert(offsetof(LaunchConfiguration, sharedMemBytes) == 24);
static_assert(offsetof(LaunchConfiguration, stream) == 32);

struct FunctionAttributes {  // cudaFuncAttributes
  size_t sharedSizeBytes;
  size_t constSizeBytes;
  size_t localSizeBytes;
  int maxThreadsPerBlock;
  int numRegs;
  int ptxVersion;
  int binaryVersion;
  int rest[26];
};
static_assert(sizeof(FunctionAttributes) == 144);

struct LtHeuristic {  // cublasLtMatmulHeuristicResult_t
  uint64_t algorithm[8];
  size_t workspaceSize;
  int state;
  float wavesCount;
  int reserved[4];
};
static_assert(sizeof(LtHeuristic) == 96);

// ---------------------------------------------------------------------------------------------------------------------
// What happened: a table of counts by kind and name
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// Made at the first use and never destroyed: CUDA's functions run before and after this library's own initialisers.
std::mutex& lock() {
  static auto* made = new std::mutex;
  return *made;
}

std::map<std::pair<std::string, std::string>, long>& counts() {
  static auto* made = new std::map<std::pair<std::string, std::string>, long>;
  return *made;
}

FILE* event_log() {
  static const char* path = getenv("FAKE_CUDA_LOG");
  static FILE* file = path && *path ? fopen(path, "a") : nullptr;
  return file;
}

void count(const char* kind, const std::string& name) {
  std::lock_guard<std::mutex> guard(lock());
  ++counts()[{kind, name}];
  if (FILE* file = event_log()) {
    fprintf(file, "%s\t%s\n", kind, name.c_str());
    fflush(file);
  }
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string found = status == 0 ? text : name;
  free(text);
  return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// Stream capture
// ---------------------------------------------------------------------------------------------------------------------

struct Capture {
  bool active = false;
  Stream stream = nullptr;
  std::thread::id thread;
  int mode = GLOBAL;
  size_t nodes = 0;
} capture;

thread_local int thread_mode = GLOBAL;

bool captured(Stream stream) { return capture.active && stream == capture.stream; }

// Whether this thread may not make calls that CUDA calls potentially unsafe (cudaStreamCaptureMode's rules).
bool unsafe_forbidden() {
  if (!capture.active || thread_mode == RELAXED) return false;
  bool own = capture.thread == std::this_thread::get_id() && capture.mode != RELAXED;
  return own || (thread_mode == GLOBAL && capture.mode == GLOBAL);
}

void unsafe(const char* call) {
  if (unsafe_forbidden()) count("illegal", call);
}

void wait(const char* call, bool of_captured_stream) {
  if (of_captured_stream || unsafe_forbidden()) count("illegal", call);
  count("wait", call);
}

// Work for the device: recorded where the stream is captured, launched otherwise.
void enqueue(const std::string& name, Stream stream) {
  if (captured(stream)) {
    ++capture.nodes;
    count("captured", name);
    return;
  }
  if (capture.active && (stream == nullptr || capture.thread == std::this_thread::get_id()))
    count("illegal", "launch on a stream that is not captured: " + name);
  count("launch", name);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: the host's. Device memory is mapped and becomes resident only where a copy writes it.
// ---------------------------------------------------------------------------------------------------------------------

constexpr size_t DEVICE_BYTES = size_t(143771) << 20;
constexpr size_t COPIED_WITHIN_DEVICE = 1 << 16;
constexpr size_t SET_WITHIN_DEVICE = 1 << 20;

using Blocks = std::map<uintptr_t, size_t>;

Blocks& device_blocks() {
  static auto* made = new Blocks;
  return *made;
}

Blocks& pinned_blocks() {
  static auto* made = new Blocks;
  return *made;
}

std::atomic<size_t> allocated{0};

bool inside(Blocks& blocks, const void* pointer) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = blocks.upper_bound(uintptr_t(pointer));
  if (found == blocks.begin()) return false;
  --found;
  return uintptr_t(pointer) < found->first + found->second;
}

void remember(Blocks& blocks, void* pointer, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock());
  blocks[uintptr_t(pointer)] = bytes;
}

size_t forget(Blocks& blocks, void* pointer) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = blocks.find(uintptr_t(pointer));
  if (found == blocks.end()) return 0;
  size_t bytes = found->second;
  blocks.erase(found);
  return bytes;
}

std::string kind_of(const void* pointer) {
  if (inside(device_blocks(), pointer)) return "device";
  return inside(pinned_blocks(), pointer) ? "pinned" : "pageable";
}

void copy(void* to, const void* from, size_t bytes, bool within_device) {
  if (!within_device || bytes <= COPIED_WITHIN_DEVICE) memcpy(to, from, bytes);
}

void copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows, Stream stream) {
  std::string kinds = kind_of(from) + " to " + kind_of(to);
  if (captured(stream)) {
    ++capture.nodes;
    if (kinds.find("pageable") != std::string::npos) count("illegal", "copy of pageable memory");
  }
  count("copy", kinds);
  for (size_t row = 0; row < rows; ++row)
    copy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, kinds == "device to device");
}

// ---------------------------------------------------------------------------------------------------------------------
// Handles and kernels
// ---------------------------------------------------------------------------------------------------------------------

// Of streams, events, modules, functions and the libraries' descriptors: numbers, never dereferenced.
void* new_handle() {
  static std::atomic<uintptr_t> last{0x1000};
  return (void*)(last += 16);
}

constexpr uintptr_t GRAPH = 0x77;
constexpr uintptr_t CONTEXT = 0x99;

std::map<const void*, std::string>& kernel_names() {
  static auto* made = new std::map<const void*, std::string>;
  return *made;
}

void name_kernel(const void* function, const std::string& name) {
  std::lock_guard<std::mutex> guard(lock());
  kernel_names()[function] = name;
}

std::string name_of(const void* function) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = kernel_names().find(function);
  return found == kernel_names().end() ? "unknown" : found->second;
}

thread_local Status last_error = SUCCESS;

Status launch(const void* function, Dim3 grid, Dim3 block, Stream stream) {
  size_t threads = size_t(block.x) * block.y * block.z;
  bool valid = grid.x > 0 && grid.x <= 2147483647u && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
  if (!valid || threads == 0 || threads > 1024 || block.z > 64) {
    count("illegal", "launch configuration of " + name_of(function));
    return INVALID_CONFIGURATION;
  }
  enqueue(name_of(function), stream);
  return SUCCESS;
}

// The runtime remembers an error for cudaGetLastError, the driver does not.
Status runtime_launch(const void* function, Dim3 grid, Dim3 block, Stream stream) {
  Status status = launch(function, grid, block, stream);
  if (status != SUCCESS) last_error = status;
  return status;
}

int attribute(int which) {  // cudaDeviceAttr and CUdevice_attribute: the same numbers, here of an H200
  switch (which) {
    case 1: return 1024;              // threads of a block
    case 2: return 1024;              // block x
    case 3: return 1024;              // block y
    case 4: return 64;                // block z
    case 5: return 2147483647;        // grid x
    case 6: return 65535;             // grid y
    case 7: return 65535;             // grid z
    case 8: return 48 << 10;          // shared memory of a block
    case 10: return 32;               // warp
    case 12: return 65536;            // registers of a block
    case 13: return 1980000;          // clock, kHz
    case 16: return 132;              // multiprocessors
    case 36: return 3201000;          // memory clock, kHz
    case 37: return 6144;             // memory bus, bits
    case 38: return 60 << 20;         // L2
    case 39: return 2048;             // threads of a multiprocessor
    case 41: return 1;                // unified addressing
    case 75: return 9;                // compute capability, major
    case 76: return 0;                // compute capability, minor
    case 81: return 228 << 10;        // shared memory of a multiprocessor
    case 82: return 65536;            // registers of a multiprocessor
    case 97: return 227 << 10;        // shared memory of a block that asks for more
    case 106: return 32;              // blocks of a multiprocessor
    default: return 0;
  }
}

}  // namespace

extern "C" {

// ---------------------------------------------------------------------------------------------------------------------
// For tests: the table as lines "kind<TAB>count<TAB>name". The text is the caller's thread's until its next call.
// ---------------------------------------------------------------------------------------------------------------------

const char* fake_cuda_counts() {
  static thread_local std::string text;
  std::lock_guard<std::mutex> guard(lock());
  text.clear();
  for (const auto& [key, number] : counts())
    text += key.first + "\t" + std::to_string(number) + "\t" + demangled(key.second) + "\n";
  return text.c_str();
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions that succeed and do nothing else
// ---------------------------------------------------------------------------------------------------------------------

#define SUCCEEDS(name) \
  Status name() { return SUCCESS; }

SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaGraphDebugDotPrint)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaMemcpyToSymbol)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuInit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cufftDestroy)
SUCCEEDS(cufftSetAutoAllocation)
SUCCEEDS(cufftSetWorkArea)

// Functions whose first argument takes a new handle.
#define MAKES_A_HANDLE(name)      \
  Status name(void** made) {      \
    *made = new_handle();         \
    return SUCCESS;               \
  }

MAKES_A_HANDLE(cudaEventCreate)
MAKES_A_HANDLE(cudaEventCreateWithFlags)
MAKES_A_HANDLE(cudaStreamCreate)
MAKES_A_HANDLE(cudaStreamCreateWithFlags)
MAKES_A_HANDLE(cudaStreamCreateWithPriority)
MAKES_A_HANDLE(cublasLtMatmulDescCreate)
MAKES_A_HANDLE(cublasLtMatmulPreferenceCreate)

// ---------------------------------------------------------------------------------------------------------------------
// Runtime: the device
// ---------------------------------------------------------------------------------------------------------------------

Status cudaGetDeviceCount(int* number) {
  *number = 1;
  return SUCCESS;
}

Status cudaGetDevice(int* device) {
  *device = 0;
  return SUCCESS;
}

Status cudaSetDevice(int device) { return device == 0 ? SUCCESS : INVALID_DEVICE; }

Status cudaDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}

Status cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}

Status cudaDeviceSynchronize() {
  wait("cudaDeviceSynchronize", capture.active);
  return SUCCESS;
}

Status cudaGetLastError() { return std::exchange(last_error, SUCCESS); }

Status cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(Status error) {
  switch (error) {
    case SUCCESS: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_CONFIGURATION: return "invalid configuration argument";
    case INVALID_DEVICE: return "invalid device ordinal";
    default: return "error of the fake GPU";
  }
}

const char* cudaGetErrorName(Status error) { return cudaGetErrorString(error); }

Status cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return SUCCESS;
}

Status cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return SUCCESS;
}

Status cudaGetDeviceProperties(DeviceProperties* properties, int device) {
  if (device != 0) return INVALID_DEVICE;
  DeviceProperties found{};
  strcpy(found.name, "NVIDIA H200 (fake)");
  found.totalGlobalMem = DEVICE_BYTES;
  found.sharedMemPerBlock = attribute(8);
  found.regsPerBlock = attribute(12);
  found.warpSize = attribute(10);
  found.maxThreadsPerBlock = attribute(1);
  for (int axis = 0; axis < 3; ++axis) {
    found.maxThreadsDim[axis] = attribute(2 + axis);
    found.maxGridSize[axis] = attribute(5 + axis);
  }
  found.major = attribute(75);
  found.minor = attribute(76);
  found.textureAlignment = 512;
  found.multiProcessorCount = attribute(16);
  found.canMapHostMemory = 1;
  found.concurrentKernels = 1;
  found.unifiedAddressing = attribute(41);
  found.memoryBusWidth = attribute(37);
  found.l2CacheSize = attribute(38);
  found.maxThreadsPerMultiProcessor = attribute(39);
  found.sharedMemPerMultiprocessor = attribute(81);
  found.regsPerMultiprocessor = attribute(82);
  found.sharedMemPerBlockOptin = attribute(97);
  found.maxBlocksPerMultiProcessor = attribute(106);
  *properties = found;
  return SUCCESS;
}

Status cudaDeviceGetAttribute(int* value, int which, int) {
  *value = attribute(which);
  return SUCCESS;
}

Status cudaDeviceGetPCIBusId(char* text, int bytes, int) {
  snprintf(text, bytes, "0000:00:00.0");
  return SUCCESS;
}

Status cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, Size, int* found) {
  *function = nullptr;
  if (found) *found = 1;  // cudaDriverEntryPointSymbolNotFound
  return INVALID_VALUE;
}

// ---------------------------------------------------------------------------------------------------------------------
// Runtime: memory
// ---------------------------------------------------------------------------------------------------------------------

Status cudaMemGetInfo(size_t* available, size_t* total) {
  *total = DEVICE_BYTES;
  *available = DEVICE_BYTES - allocated;
  return SUCCESS;
}

Status cudaMalloc(void** made, size_t bytes) {
  unsafe("cudaMalloc");
  if (allocated + bytes > DEVICE_BYTES) return last_error = OUT_OF_MEMORY;
  bytes = bytes ? bytes : 1;
  void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED) return last_error = OUT_OF_MEMORY;
  remember(device_blocks(), block, bytes);
  allocated += bytes;
  *made = block;
  return SUCCESS;
}

Status cudaFree(void* block) {
  if (!block) return SUCCESS;
  wait("cudaFree", false);
  size_t bytes = forget(device_blocks(), block);
  if (bytes == 0) return last_error = INVALID_VALUE;
  munmap(block, bytes);
  allocated -= bytes;
  return SUCCESS;
}

Status cudaMallocAsync(void** made, size_t bytes, Stream) { return cudaMalloc(made, bytes); }

Status cudaFreeAsync(void* block, Stream) {
  size_t bytes = forget(device_blocks(), block);
  if (bytes == 0) return last_error = INVALID_VALUE;
  munmap(block, bytes);
  allocated -= bytes;
  return SUCCESS;
}

Status cudaHostAlloc(void** made, size_t bytes, unsigned) {
  unsafe("cudaHostAlloc");
  *made = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*made) return last_error = OUT_OF_MEMORY;
  remember(pinned_blocks(), *made, bytes);
  return SUCCESS;
}

Status cudaFreeHost(void* block) {
  unsafe("cudaFreeHost");
  forget(pinned_blocks(), block);
  free(block);
  return SUCCESS;
}

Status cudaHostRegister(void* block, size_t bytes, unsigned) {
  unsafe("cudaHostRegister");
  remember(pinned_blocks(), block, bytes);
  return SUCCESS;
}

Status cudaHostUnregister(void* block) {
  unsafe("cudaHostUnregister");
  forget(pinned_blocks(), block);
  return SUCCESS;
}

Status cudaPointerGetAttributes(PointerAttributes* attributes, const void* pointer) {
  *attributes = PointerAttributes{};
  if (inside(device_blocks(), pointer)) {
    attributes->type = 2;
    attributes->devicePointer = (void*)pointer;
  } else if (inside(pinned_blocks(), pointer)) {
    attributes->type = 1;
    attributes->hostPointer = (void*)pointer;
  }
  return SUCCESS;
}

Status cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, Stream stream) {
  copy_rows(to, bytes, from, bytes, bytes, 1, stream);
  return SUCCESS;
}

Status cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  wait("cudaMemcpy", capture.active);
  copy_rows(to, bytes, from, bytes, bytes, 1, nullptr);
  return SUCCESS;
}

Status cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows, int, Stream stream) {
  copy_rows(to, to_pitch, from, from_pitch, width, rows, stream);
  return SUCCESS;
}

Status cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, Stream stream) {
  copy_rows(to, bytes, from, bytes, bytes, 1, stream);
  return SUCCESS;
}

Status cudaMemsetAsync(void* block, int value, size_t bytes, Stream stream) {
  enqueue("memset", stream);
  if (bytes <= SET_WITHIN_DEVICE) memset(block, value, bytes);
  return SUCCESS;
}

Status cudaMemset(void* block, int value, size_t bytes) { return cudaMemsetAsync(block, value, bytes, nullptr); }

Status cudaGetSymbolAddress(void** address, const void*) {
  static char symbols[1 << 16];
  *address = symbols;
  return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Runtime: streams, events and graphs. All work is done as soon as it is queued.
// ---------------------------------------------------------------------------------------------------------------------

Status cudaStreamGetPriority(Stream, int* priority) {
  *priority = 0;
  return SUCCESS;
}

Status cudaStreamSynchronize(Stream stream) {
  wait("cudaStreamSynchronize", captured(stream));
  return SUCCESS;
}

Status cudaStreamAddCallback(Stream stream, void (*function)(Stream, Status, void*), void* data, unsigned) {
  function(stream, SUCCESS, data);
  return SUCCESS;
}

Status cudaLaunchHostFunc(Stream, void (*function)(void*), void* data) {
  function(data);
  return SUCCESS;
}

Status cudaEventQuery(void*) {
  unsafe("cudaEventQuery");
  return SUCCESS;
}

Status cudaEventSynchronize(void*) {
  wait("cudaEventSynchronize", false);
  return SUCCESS;
}

Status cudaEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 1.0f;
  return SUCCESS;
}

Status cudaStreamIsCapturing(Stream stream, int* status) {
  *status = captured(stream) ? 1 : 0;
  return SUCCESS;
}

Status cudaStreamGetCaptureInfo(
    Stream stream, int* status, Size* id, uintptr_t* graph, const void**, const void**, size_t* dependencies) {
  *status = captured(stream) ? 1 : 0;
  if (id) *id = 7;
  if (graph) *graph = GRAPH;
  if (dependencies) *dependencies = 0;
  return SUCCESS;
}

Status cudaStreamBeginCapture(Stream stream, int mode) {
  capture.stream = stream;
  capture.thread = std::this_thread::get_id();
  capture.mode = mode;
  capture.nodes = 0;
  capture.active = true;
  return SUCCESS;
}

Status cudaStreamEndCapture(Stream, uintptr_t* graph) {
  capture.active = false;
  *graph = GRAPH;
  return SUCCESS;
}

Status cudaThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, thread_mode);
  return SUCCESS;
}

Status cudaGraphInstantiateWithFlags(uintptr_t* executable, uintptr_t, Size) {
  *executable = GRAPH;
  return SUCCESS;
}

Status cudaGraphLaunch(uintptr_t, Stream stream) {
  enqueue("graph", stream);
  return SUCCESS;
}

Status cudaGraphGetNodes(uintptr_t, void*, size_t* number) {
  *number = capture.nodes;
  return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Runtime: kernels
// ---------------------------------------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary() {
  static void* handle[4];
  return handle;
}

void __cudaRegisterFatBinaryEnd() {}

void __cudaUnregisterFatBinary() {}

char __cudaInitModule() { return 1; }

void __cudaRegisterVar() {}

void __cudaRegisterFunction(void**, const void* function, char*, const char* name) { name_kernel(function, name); }

static thread_local LaunchConfiguration pushed;

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t bytes, Stream stream) {
  pushed = LaunchConfiguration{grid, block, {bytes}, stream, nullptr, 0};
  return 0;
}

Status __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* bytes, Stream* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *bytes = pushed.dynamicSmemBytes;
  *stream = pushed.stream;
  return SUCCESS;
}

Status __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return SUCCESS;
}

Status cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void**, size_t, Stream stream) {
  return runtime_launch(function, grid, block, stream);
}

Status __cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void**, size_t, Stream stream) {
  return runtime_launch(function, grid, block, stream);
}

Status cudaLaunchCooperativeKernel(const void* function, Dim3 grid, Dim3 block, void**, size_t, Stream stream) {
  return runtime_launch(function, grid, block, stream);
}

Status cudaLaunchKernelExC(const LaunchConfiguration* configuration, const void* function, void**) {
  return runtime_launch(function, configuration->grid, configuration->block, configuration->stream);
}

Status cudaFuncGetAttributes(FunctionAttributes* attributes, const void*) {
  *attributes = FunctionAttributes{};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = 90;
  attributes->binaryVersion = 90;
  return SUCCESS;
}

Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// cuBLAS and cuBLASLt: each call that computes is one launch
// ---------------------------------------------------------------------------------------------------------------------

Status cublasCreate_v2(Stream** handle) {
  *handle = new Stream(nullptr);  // what a handle knows: its stream
  return SUCCESS;
}

Status cublasSetStream_v2(Stream* handle, Stream stream) {
  *handle = stream;
  return SUCCESS;
}

Status cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return SUCCESS;
}

Status cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return SUCCESS;
}

#define COMPUTES(name)            \
  Status name(Stream* handle) {   \
    enqueue(#name, *handle);      \
    return SUCCESS;               \
  }

COMPUTES(cublasDdot_v2)
COMPUTES(cublasDgemm_v2)
COMPUTES(cublasDgemmStridedBatched)
COMPUTES(cublasDgemv_v2)
COMPUTES(cublasDotEx)
COMPUTES(cublasGemmEx)
COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasSdot_v2)
COMPUTES(cublasSgemm_v2)
COMPUTES(cublasSgemmBatched)
COMPUTES(cublasSgemmEx)
COMPUTES(cublasSgemmStridedBatched)
COMPUTES(cublasSgemv_v2)

size_t cublasLtGetVersion() { return 130100; }

Status cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) {
  *layout = new_handle();
  return SUCCESS;
}

Status cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, LtHeuristic* results, int* number) {
  results[0] = LtHeuristic{};
  *number = 1;
  return SUCCESS;
}

Status cublasLtMatmul(
    void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, size_t, Stream stream) {
  enqueue("cublasLtMatmul", stream);
  return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// cuFFT: each execution is one launch, on the stream of the last cufftSetStream
// ---------------------------------------------------------------------------------------------------------------------

static thread_local Stream fft_stream = nullptr;

Status cufftCreate(int* plan) {
  *plan = 1;
  return SUCCESS;
}

Status cufftSetStream(int, Stream stream) {
  fft_stream = stream;
  return SUCCESS;
}

Status cufftXtMakePlanMany(
    int, int, Size*, Size*, Size, Size, int, Size*, Size, Size, int, Size, size_t* workspace, int) {
  *workspace = 1024;
  return SUCCESS;
}

Status cufftXtExec(int, void*, void*, int) {
  enqueue("cufftXtExec", fft_stream);
  return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Driver: what Triton and PyTorch's just-in-time compilers call
// ---------------------------------------------------------------------------------------------------------------------

Status cuDriverGetVersion(int* version) { return cudaDriverGetVersion(version); }

Status cuDeviceGet(int* device, int) {
  *device = 0;
  return SUCCESS;
}

Status cuDeviceGetCount(int* number) { return cudaGetDeviceCount(number); }

Status cuDeviceGetAttribute(int* value, int which, int) {
  *value = attribute(which);
  return SUCCESS;
}

Status cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return SUCCESS;
}

Status cuDevicePrimaryCtxRetain(uintptr_t* context, int) {
  *context = CONTEXT;
  return SUCCESS;
}

Status cuCtxGetCurrent(uintptr_t* context) {
  *context = CONTEXT;
  return SUCCESS;
}

Status cuCtxGetDevice(int* device) {
  *device = 0;
  return SUCCESS;
}

Status cuCtxGetLimit(size_t* value, int) {
  *value = 0;
  return SUCCESS;
}

Status cuGetErrorString(Status error, const char** text) {
  *text = cudaGetErrorString(error);
  return SUCCESS;
}

Status cuGetErrorName(Status error, const char** text) {
  *text = cudaGetErrorString(error);
  return SUCCESS;
}

Status cuModuleLoadData(void** module, const void*) {
  unsafe("cuModuleLoadData");
  *module = new_handle();
  return SUCCESS;
}

Status cuModuleLoad(void** module, const char*) { return cuModuleLoadData(module, nullptr); }

Status cuModuleGetFunction(void** function, void*, const char* name) {
  *function = new_handle();
  name_kernel(*function, std::string("triton: ") + name);
  return SUCCESS;
}

Status cuFuncGetAttribute(int* value, int which, void*) {
  *value = which == 0 ? 1024 : which == 4 ? 64 : 0;  // threads of a block, registers; nothing spills
  return SUCCESS;
}

Status cuOccupancyMaxActiveClusters(int* clusters, void*, const void*) {
  *clusters = 1;
  return SUCCESS;
}

Status cuPointerGetAttribute(void* value, int which, uint64_t pointer) {
  constexpr int DEVICE_POINTER = 3;
  if (which != DEVICE_POINTER) {
    memset(value, 0, sizeof(int));
    return SUCCESS;
  }
  *(uint64_t*)value = pointer;
  bool known = inside(device_blocks(), (void*)pointer) || inside(pinned_blocks(), (void*)pointer);
  return known ? SUCCESS : INVALID_VALUE;
}

Status cuPointerGetAttributes(unsigned number, int* which, void** values, uint64_t pointer) {
  for (unsigned i = 0; i < number; ++i) cuPointerGetAttribute(values[i], which[i], pointer);
  return SUCCESS;
}

Status cuLaunchKernelEx(const LaunchConfiguration* configuration, void* function, void**, void**) {
  return launch(function, configuration->grid, configuration->block, configuration->stream);
}

Status cuLaunchKernel(
    void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned, Stream stream, void**, void**) {
  return launch(function, Dim3{grid_x, grid_y, grid_z}, Dim3{block_x, block_y, block_z}, stream);
}

}  // extern "C"
