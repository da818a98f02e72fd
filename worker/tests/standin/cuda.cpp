// CUDA's driver, run-time compiler and matrix products on the CPU, one library under three names.
//
// It has the functions that worker/src/kernels/cuda/driver calls, and is as unkind as CUDA may be. What is queued is done when
// somebody waits for it and not before, so that memory that is given back or read too early is seen; new memory is NaNs; a graph
// is spoilt by what may wait for the device while it is recorded; every handle and launch is checked, and that it is of the GPU
// that it is used on, of which there are two. What breaks a rule ends the process with a sentence. Not seen is which memory a
// kernel may use: any that there is, of either GPU.
//
// Kernels are the emulator's (emulate.hpp), compiled from the text that nvrtcCompileProgram was given by the compiler that
// $STANDIN_COMPILER names, once for all programs that share the folder $STANDIN_FOLDER. The GPUs are of the compute capability
// $STANDIN_CAPABILITY, times ten: 80 if it is not set, or 90.

#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

[[noreturn]] __attribute__((format(printf, 1, 2))) static void broken(const char* format, ...) {
    va_list values;
    va_start(values, format);
    fprintf(stderr, "\nCUDA's stand-in: ");
    vfprintf(stderr, format, values);
    fprintf(stderr, "\n");
    va_end(values);
    _exit(70);
}

// ---- What there is ----

// CUresult.
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901
};

constexpr int GPUS = 2;

constexpr int THREADS_MOST = 1024, BLOCKS_ACROSS_MOST = 65535;
static bool is_hopper() {
    const char* capability = getenv("STANDIN_CAPABILITY");
    return capability != nullptr && strcmp(capability, "90") == 0;
}
// What a kernel gets that asks for it.
static int shared_bytes_most() { return (is_hopper() ? 227 : 163) * 1024; }
constexpr size_t MEMORY_BYTES = size_t(4) << 30;

using Operation = std::function<void()>;

struct Context {
    int retained = 0;
};
static Context contexts[GPUS];
static thread_local Context* current;

// Whatever is made is of the context that is the thread's then.
struct Owned {
    Context* owner = current;
};

struct Stream : Owned {
    std::deque<Operation> queued;
    std::vector<Operation> recorded;
    bool records = false, spoilt = false;
};
struct Graph : Owned {
    std::vector<Operation> operations;
    // Times that it is queued and not done.
    int under_way = 0;
};
struct Event : Owned {
    Stream* stream = nullptr;
    double ms = -1.0;
    // Times that it is queued and not reached.
    int under_way = 0;
};
typedef void (*Launch)(void*, const unsigned*, const unsigned*, unsigned, const long long*, const float*);
struct Code {
    void* loaded = nullptr;
    Launch launch;
    std::string text;
};
struct Module : Owned {
    const Code* code;
};
// A parameter: a float, or an integer, an address or a tensor map, of so many bytes.
struct Parameter {
    bool is_float;
    int bytes;
};
constexpr int MAP_BYTES = 128;
struct Kernel : Owned {
    std::string name;
    void* code;
    Launch launch;
    std::vector<Parameter> parameters;
    // Dynamic ones that it was allowed. Without being asked CUDA has 48 KiB, less its static ones, which nobody knows here.
    int shared_bytes = 0;
    // Then its code takes its arguments' addresses.
    bool has_maps = false;
};
struct alignas(64) ArgumentBytes {
    char bytes[MAP_BYTES];
};
struct Blas : Owned {
    // Kinds of products whose kernels are loaded.
    std::set<std::string> loaded;
};
struct Memory : Owned {
    size_t bytes;
};

// Never destroyed, as other threads may be in a call when the program ends.
static auto& all = *new std::recursive_mutex;
static bool is_initialised;
static auto& memory = *new std::map<uintptr_t, Memory>;
static auto& streams = *new std::set<Stream*>;
static auto& graphs = *new std::set<Graph*>;
static auto& executables = *new std::set<Graph*>;
static auto& events = *new std::set<Event*>;
static auto& modules = *new std::set<Module*>;
static auto& kernels = *new std::set<Kernel*>;
static auto& handles = *new std::set<Blas*>;
static auto& by_text = *new std::map<std::string, Code>;

// Every function of the driver's begins so: alone, and in the context of this thread.
struct Call {
    std::lock_guard<std::recursive_mutex> alone{all};
    explicit Call(const char* name, bool in_context = true) {
        if (!is_initialised) broken("%s before cuInit", name);
        if (in_context && (current == nullptr || current->retained == 0)) broken("%s in a thread without a context", name);
    }
};
template <typename Kind>
static Kind* known(const std::set<Kind*>& kinds, void* handle, const char* name) {
    if (kinds.count((Kind*)handle) == 0) broken("%s of something that is not there, or not any more", name);
    if (((Kind*)handle)->owner != current) broken("%s of something that another GPU has", name);
    return (Kind*)handle;
}

template <typename Kind>
static int destroy(std::set<Kind*>& kinds, void* handle, const char* name) {
    Kind* one = known(kinds, handle, name);
    kinds.erase(one);
    delete one;
    return SUCCESS;
}

// What waits for the whole device, or may do so, ends every recording.
static void may_wait_for_the_device() {
    for (Stream* stream : streams) stream->spoilt |= stream->records && stream->owner == current;
}

static void enqueue(Stream* stream, Operation operation) {
    if (stream->records)
        stream->recorded.push_back(std::move(operation));
    else
        stream->queued.push_back(std::move(operation));
}
static int finish(Stream* stream) {
    if (stream->records) {
        stream->spoilt = true;
        return CAPTURE_UNSUPPORTED;
    }
    while (!stream->queued.empty()) {
        const Operation operation = std::move(stream->queued.front());
        stream->queued.pop_front();
        operation();
    }
    return SUCCESS;
}

static void no_such_memory(int) {
    const char sentence[] = "\nCUDA's stand-in: memory was read or written that was given back, or never was\n";
    _exit(write(2, sentence, sizeof sentence - 1) < 0 ? 71 : 70);
}

// ---- The driver ----

API int cuInit(unsigned) {
    std::lock_guard<std::recursive_mutex> alone(all);
    is_initialised = true;
    struct sigaction action = {};
    action.sa_handler = no_such_memory;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    return SUCCESS;
}
API int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
API int cuGetErrorString(int, const char** words) { return *words = "the stand-in's words", SUCCESS; }
API int cuDeviceGetCount(int* count) {
    Call call("cuDeviceGetCount", false);
    return *count = GPUS, SUCCESS;
}
API int cuDeviceGet(int* device, int number) {
    Call call("cuDeviceGet", false);
    return *device = number, number < GPUS ? SUCCESS : INVALID_DEVICE;
}
API int cuDeviceGetName(char* name, int bytes, int) {
    Call call("cuDeviceGetName", false);
    return snprintf(name, bytes, "stand-in"), SUCCESS;
}
API int cuDeviceTotalMem_v2(size_t* bytes, int) {
    Call call("cuDeviceTotalMem", false);
    return *bytes = MEMORY_BYTES, SUCCESS;
}
API int cuDeviceGetAttribute(int* value, int attribute, int) {
    Call call("cuDeviceGetAttribute", false);
    switch (attribute) {
    case 75: // The compute capability, and its second part.
        *value = is_hopper() ? 9 : 8;
        break;
    case 76:
        *value = 0;
        break;
    case 16: // Multiprocessors.
        *value = 2;
        break;
    case 97: // Shared memory of a block, where it is asked for.
        *value = shared_bytes_most();
        break;
    default:
        broken("nobody knows the device's attribute %d", attribute);
    }
    return SUCCESS;
}

API int cuDevicePrimaryCtxRetain(void** made, int device) {
    Call call("cuDevicePrimaryCtxRetain", false);
    contexts[device].retained++;
    return *made = &contexts[device], SUCCESS;
}
template <typename Kind>
static void nothing_left(const std::set<Kind*>& kinds, const Context* of, const char* what) {
    for (const Kind* one : kinds)
        if (one->owner == of) broken("a GPU is left with %s", what);
}
API int cuDevicePrimaryCtxRelease_v2(int device) {
    Call call("cuDevicePrimaryCtxRelease", false);
    Context* of = &contexts[device];
    if (of->retained == 0) broken("a context is released more often than it was retained");
    if (--of->retained > 0) return SUCCESS;
    for (const auto& [address, piece] : memory)
        if (piece.owner == of) broken("a GPU is left with %zu bytes of memory at %p", piece.bytes, (void*)address);
    nothing_left(streams, of, "a queue");
    nothing_left(graphs, of, "a graph");
    nothing_left(executables, of, "what was made of a graph");
    nothing_left(events, of, "an event");
    nothing_left(handles, of, "a handle of cuBLASLt's");
    nothing_left(modules, of, "a module");
    return SUCCESS;
}
API int cuCtxSetCurrent(void* handle) {
    Call call("cuCtxSetCurrent", false);
    Context* to = (Context*)handle;
    if (to < contexts || to >= contexts + GPUS || to->retained == 0) broken("a context that is not there is made a thread's");
    return current = to, SUCCESS;
}

API int cuStreamCreate(void** made, unsigned flags) {
    Call call("cuStreamCreate");
    if (flags != 1) broken("a queue that waits for the default one");
    Stream* stream = new Stream;
    streams.insert(stream);
    return *made = stream, SUCCESS;
}
API int cuStreamDestroy_v2(void* handle) {
    Call call("cuStreamDestroy");
    Stream* stream = known(streams, handle, "cuStreamDestroy");
    if (stream->records || !stream->queued.empty()) broken("a queue is destroyed with work in it");
    streams.erase(stream);
    delete stream;
    return SUCCESS;
}
API int cuStreamSynchronize(void* handle) {
    Call call("cuStreamSynchronize");
    return finish(known(streams, handle, "cuStreamSynchronize"));
}

static size_t held_bytes() {
    size_t held = 0;
    for (const auto& [address, piece] : memory) held += piece.owner == current ? piece.bytes : 0;
    return held;
}
API int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    Call call("cuMemGetInfo");
    return *free_bytes = MEMORY_BYTES - held_bytes(), *total = MEMORY_BYTES, SUCCESS;
}
static const size_t PAGE = sysconf(_SC_PAGESIZE);
static size_t in_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
// Nobody's from here on, and no memory of the machine's.
static void forbid(uintptr_t from, size_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (mmap((void*)from, bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED) broken("memory cannot be taken away");
}
// The end of what was asked for is the end of a page as far as alignment lets it be, and no page follows.
API int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
    Call call("cuMemAlloc");
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > MEMORY_BYTES - held_bytes()) return OUT_OF_MEMORY;
    const size_t pages = in_pages(bytes);
    char* mapped =
        (char*)mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return OUT_OF_MEMORY;
    forbid((uintptr_t)mapped + pages, PAGE);
    const uintptr_t at = (uintptr_t)mapped + (pages - bytes) / 256 * 256;
    memset((void*)at, 0xff, bytes);
    memory[at].bytes = bytes;
    return *address = at, SUCCESS;
}
// Nothing is waited for, and the addresses are nobody's from here on.
API int cuMemFree_v2(unsigned long long address) {
    Call call("cuMemFree");
    const auto found = memory.find(address);
    if (found == memory.end()) broken("memory is given back that is nobody's");
    if (found->second.owner != current) broken("memory is given back that another GPU has");
    forbid(address / PAGE * PAGE, in_pages(address % PAGE + found->second.bytes));
    memory.erase(found);
    return SUCCESS;
}
static void check_range(unsigned long long address, size_t bytes, const char* name) {
    auto found = memory.upper_bound(address);
    if (found == memory.begin() || address + bytes > (--found)->first + found->second.bytes)
        broken("%s of %zu bytes that are not all of one piece of memory", name, bytes);
    if (found->second.owner != current) broken("%s of memory that another GPU has", name);
}
API int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, void* stream) {
    Call call("cuMemcpyHtoD");
    check_range(to, bytes, "cuMemcpyHtoD");
    enqueue(known(streams, stream, "cuMemcpyHtoD"), [=] { memcpy((void*)to, from, bytes); });
    return SUCCESS;
}
API int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void* stream) {
    Call call("cuMemcpyDtoH");
    check_range(from, bytes, "cuMemcpyDtoH");
    enqueue(known(streams, stream, "cuMemcpyDtoH"), [=] { memcpy(to, (const void*)from, bytes); });
    return SUCCESS;
}
API int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void* stream) {
    Call call("cuMemcpyDtoD");
    check_range(to, bytes, "cuMemcpyDtoD"), check_range(from, bytes, "cuMemcpyDtoD");
    enqueue(known(streams, stream, "cuMemcpyDtoD"), [=] { memcpy((void*)to, (const void*)from, bytes); });
    return SUCCESS;
}
API int cuMemsetD8Async(unsigned long long to, unsigned char value, size_t bytes, void* stream) {
    Call call("cuMemsetD8");
    check_range(to, bytes, "cuMemsetD8");
    enqueue(known(streams, stream, "cuMemsetD8"), [=] { memset((void*)to, value, bytes); });
    return SUCCESS;
}

// ---- Kernels ----

static void run(const std::string& command) {
    std::string printed;
    FILE* pipe = popen((command + " 2>&1").c_str(), "r");
    if (pipe == nullptr) broken("%s cannot be run", command.c_str());
    char some[4096];
    for (size_t count; (count = fread(some, 1, sizeof some, pipe)) > 0;) printed.append(some, count);
    if (pclose(pipe) != 0) broken("%s fails: %s", command.c_str(), printed.c_str());
}
static bool is_there(const std::string& file) { return access(file.c_str(), R_OK) == 0; }
static std::string setting(const char* name) {
    const char* value = getenv(name);
    if (value == nullptr) broken("%s is not set", name);
    return value;
}

// The list of a kernel's parameters, from the text that declares it.
static std::vector<std::string> list_of(const std::string& text, const std::string& name) {
    const std::string declares = "void " + name + "(";
    const size_t at = text.find(declares);
    if (at == std::string::npos) broken("the parameters of %s were not found", name.c_str());
    const size_t from = at + declares.size();
    std::stringstream list(text.substr(from, text.find(')', from) - from));
    std::vector<std::string> parameters;
    for (std::string one; std::getline(list, one, ',');) parameters.push_back(one);
    return parameters;
}
static bool takes_maps(const std::vector<std::string>& parameters) {
    for (const std::string& one : parameters)
        if (one.find("TensorMap") != std::string::npos) return true;
    return false;
}
// For kernels that take tensor maps, which emulate_launch has no way to hand on: a function of the arguments' addresses.
static std::string forwarder(const std::string& text, const std::string& name) {
    const std::vector<std::string> parameters = list_of(text, name);
    if (!takes_maps(parameters)) return "";
    std::string call;
    for (size_t i = 0; i < parameters.size(); i++) {
        const std::string type = parameters[i].substr(0, parameters[i].find_last_of(" *&") + 1);
        call += (i == 0 ? "*(" : ", *(") + type + "*)arguments[" + std::to_string(i) + "]";
    }
    return "extern \"C\" __global__ void forward_" + name + "(void* const* arguments) { " + name + "(" + call + "); }\n";
}
static std::string spaced(std::istream&& text) {
    std::string all_of_it;
    for (std::string word; text >> word;) all_of_it += word + " ";
    return all_of_it;
}
// The names of all kernels.
static std::vector<std::string> kernels_of(const std::string& text) {
    const std::string declares = "extern \"C\" __attribute__((visibility(\"default\"))) void ";
    std::vector<std::string> names;
    for (size_t at = 0; (at = text.find(declares, at)) != std::string::npos;) {
        at += declares.size();
        names.push_back(text.substr(at, text.find('(', at) - at));
    }
    return names;
}

// Code is a line of options and the text.
API int cuModuleLoadData(void** made, const void* code) {
    Call call("cuModuleLoadData");
    may_wait_for_the_device();
    const std::string all_of_it = (const char*)code;
    Code& compiled = by_text[all_of_it];
    if (compiled.loaded == nullptr) {
        const size_t line = all_of_it.find('\n');
        const std::string folder = setting("STANDIN_FOLDER");
        const std::string file = folder + "/unit-" + std::to_string(std::hash<std::string>()(all_of_it));
        const std::string own = file + "-" + std::to_string(getpid());
        if (!is_there(file + ".so")) {
            std::ofstream(own + ".cpp") << all_of_it.substr(line + 1);
            const auto quoted = [](const std::string& path) { return " '" + path + "' "; };
            const std::string compiler = setting("STANDIN_COMPILER") + " -std=c++17 -w -DSANDERLING_EMULATE=1 " +
                all_of_it.substr(0, line) + "-I" + quoted(folder) + quoted(own + ".cpp");
            run(compiler + "-E -P -o" + quoted(own + ".txt"));
            const std::string text = spaced(std::ifstream(own + ".txt"));
            std::ofstream more(own + ".cpp", std::ios::app);
            for (const std::string& name : kernels_of(text))
                if (name != "emulate_launch") more << forwarder(text, name);
            more.close();
            run(compiler + "-O1 -fPIC -shared -fvisibility=hidden -ffp-contract=off -o" + quoted(own + ".so"));
            // The text first, as who finds the code reads it.
            for (const char* ending : {".txt", ".so"})
                if (rename((own + ending).c_str(), (file + ending).c_str()) != 0) broken("%s cannot be named", own.c_str());
        }
        compiled.loaded = dlopen((file + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
        if (compiled.loaded == nullptr) broken("%s", dlerror());
        compiled.launch = (Launch)dlsym(compiled.loaded, "emulate_launch");
        compiled.text = spaced(std::ifstream(file + ".txt"));
    }
    Module* module = new Module;
    module->code = &compiled;
    modules.insert(module);
    return *made = module, SUCCESS;
}

static std::vector<Parameter> parameters_of(const std::string& text, const std::string& name) {
    std::vector<Parameter> parameters;
    for (const std::string& one : list_of(text, name)) {
        const auto has = [&](const char* word) { return one.find(word) != std::string::npos; };
        const bool is_map = has("TensorMap"), is_word = has("*") || has("long long");
        if (!is_map && !is_word && !has("int") && !has("unsigned") && !has("float"))
            broken("%s takes %s", name.c_str(), one.c_str());
        parameters.push_back({!is_map && !is_word && has("float"), is_map ? MAP_BYTES : is_word ? 8 : 4});
    }
    return parameters;
}
API int cuModuleUnload(void* handle) {
    Call call("cuModuleUnload");
    may_wait_for_the_device();
    return destroy(modules, handle, "cuModuleUnload");
}
API int cuModuleGetFunction(void** made, void* handle, const char* name) {
    Call call("cuModuleGetFunction");
    may_wait_for_the_device();
    const Code& compiled = *known(modules, handle, "cuModuleGetFunction")->code;
    const bool has_maps = takes_maps(list_of(compiled.text, name));
    void* code = dlsym(compiled.loaded, ((has_maps ? "forward_" : "") + std::string(name)).c_str());
    if (code == nullptr) return NOT_FOUND;
    Kernel* kernel = new Kernel;
    kernel->name = name, kernel->code = code, kernel->launch = compiled.launch;
    kernel->parameters = parameters_of(compiled.text, name), kernel->has_maps = has_maps;
    kernels.insert(kernel);
    return *made = kernel, SUCCESS;
}
API int cuFuncSetAttribute(void* handle, int attribute, int value) {
    Call call("cuFuncSetAttribute");
    if (attribute != 8) broken("a kernel has no attribute %d here", attribute);
    if (value > shared_bytes_most()) return INVALID_VALUE;
    return known(kernels, handle, "cuFuncSetAttribute")->shared_bytes = value, SUCCESS;
}
API int cuLaunchKernel(
    void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes,
    void* stream, void** arguments, void**) {
    Call call("cuLaunchKernel");
    const Kernel* kernel = known(kernels, handle, "cuLaunchKernel");
    const unsigned threads = bx * by * bz;
    const bool fits = gx >= 1 && gy >= 1 && gz >= 1 && gx <= INT32_MAX && gy <= BLOCKS_ACROSS_MOST &&
        gz <= BLOCKS_ACROSS_MOST && threads >= 1 && threads <= THREADS_MOST && (int)shared_bytes <= kernel->shared_bytes;
    if (!fits) return INVALID_VALUE;
    std::vector<long long> words(24);
    std::vector<float> floats(8);
    std::vector<ArgumentBytes> copies(kernel->parameters.size());
    size_t words_used = 0, floats_used = 0;
    for (size_t i = 0; i < kernel->parameters.size(); i++) {
        const Parameter& parameter = kernel->parameters[i];
        if (arguments[i] == nullptr) broken("%s lacks its argument %zu", kernel->name.c_str(), i);
        memcpy(copies[i].bytes, arguments[i], parameter.bytes);
        if (kernel->has_maps) continue;
        // A word's upper half is nothing that an int would see.
        if (parameter.is_float)
            floats.at(floats_used++) = *(const float*)arguments[i];
        else
            words.at(words_used++) = parameter.bytes == 8 ? *(const long long*)arguments[i] : *(const int*)arguments[i];
    }
    enqueue(known(streams, stream, "cuLaunchKernel"), [=] {
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        std::vector<const void*> addresses;
        for (const ArgumentBytes& copy : copies) addresses.push_back(copy.bytes);
        std::vector<long long> handed = words;
        if (kernel->has_maps) handed[0] = (long long)addresses.data();
        kernel->launch(kernel->code, grid, block, shared_bytes, handed.data(), floats.data());
    });
    return SUCCESS;
}

// ---- Graphs and events ----

API int cuStreamBeginCapture_v2(void* handle, int mode) {
    Call call("cuStreamBeginCapture");
    Stream* stream = known(streams, handle, "cuStreamBeginCapture");
    if (mode != 2) broken("a recording that forbids other threads to allocate");
    if (stream->records || !stream->queued.empty()) broken("a recording of a queue that is in use");
    stream->records = true, stream->spoilt = false;
    return SUCCESS;
}
API int cuStreamEndCapture(void* handle, void** made) {
    // Other threads do what they do meanwhile.
    usleep(2000);
    Call call("cuStreamEndCapture");
    Stream* stream = known(streams, handle, "cuStreamEndCapture");
    if (!stream->records) broken("the end of a recording that did not begin");
    stream->records = false;
    std::vector<Operation> recorded = std::move(stream->recorded);
    stream->recorded.clear();
    *made = nullptr;
    if (stream->spoilt) return CAPTURE_INVALIDATED;
    Graph* graph = new Graph;
    graph->operations = std::move(recorded);
    graphs.insert(graph);
    return *made = graph, SUCCESS;
}
API int cuGraphInstantiateWithFlags(void** made, void* handle, unsigned long long) {
    Call call("cuGraphInstantiate");
    Graph* executable = new Graph;
    executable->operations = known(graphs, handle, "cuGraphInstantiate")->operations;
    executables.insert(executable);
    return *made = executable, SUCCESS;
}
API int cuGraphLaunch(void* handle, void* stream) {
    Call call("cuGraphLaunch");
    Graph* executable = known(executables, handle, "cuGraphLaunch");
    for (const Operation& operation : executable->operations)
        enqueue(known(streams, stream, "cuGraphLaunch"), operation);
    executable->under_way++;
    enqueue((Stream*)stream, [=] { executable->under_way--; });
    return SUCCESS;
}
API int cuGraphDestroy(void* handle) {
    Call call("cuGraphDestroy");
    return destroy(graphs, handle, "cuGraphDestroy");
}
API int cuGraphExecDestroy(void* handle) {
    Call call("cuGraphExecDestroy");
    if (known(executables, handle, "cuGraphExecDestroy")->under_way > 0) broken("a graph is given back while it is queued");
    return destroy(executables, handle, "cuGraphExecDestroy");
}

API int cuEventCreate(void** made, unsigned) {
    Call call("cuEventCreate");
    Event* event = new Event;
    events.insert(event);
    return *made = event, SUCCESS;
}
API int cuEventRecord(void* handle, void* stream) {
    Call call("cuEventRecord");
    Event* event = known(events, handle, "cuEventRecord");
    event->stream = known(streams, stream, "cuEventRecord");
    event->under_way++;
    enqueue(event->stream, [=] {
        event->under_way--;
        const auto now = std::chrono::steady_clock::now().time_since_epoch();
        event->ms = std::chrono::duration<double, std::milli>(now).count();
    });
    return SUCCESS;
}
API int cuEventSynchronize(void* handle) {
    Call call("cuEventSynchronize");
    Event* event = known(events, handle, "cuEventSynchronize");
    if (event->stream == nullptr) broken("an event is waited for that is in no queue");
    return finish(event->stream);
}
API int cuEventElapsedTime_v2(float* ms, void* from, void* to) {
    Call call("cuEventElapsedTime");
    const Event *first = known(events, from, "cuEventElapsedTime"), *last = known(events, to, "cuEventElapsedTime");
    if (first->ms < 0.0 || last->ms < 0.0) return NOT_READY;
    return *ms = (float)(last->ms - first->ms), SUCCESS;
}
API int cuEventDestroy_v2(void* handle) {
    Call call("cuEventDestroy");
    if (known(events, handle, "cuEventDestroy")->under_way > 0) broken("an event is destroyed while it is queued");
    return destroy(events, handle, "cuEventDestroy");
}
// As EmulateTensor of the emulator's hopper.hpp, which load_box reads of a tensor map.
struct EmulatedTensor {
    const void* data;
    long long sizes[3], strides[2];
};
API int cuTensorMapEncodeTiled(
    void* map, int type, unsigned rank, void* address, const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
    const uint32_t* steps, int interleave, int swizzle, int, int fill) {
    Call call("cuTensorMapEncodeTiled");
    if (!is_hopper()) broken("a tensor map for a card that has no copy engine");
    constexpr int BFLOAT16 = 9, SWIZZLE_128B = 3;
    bool is_right = type == BFLOAT16 && interleave == 0 && swizzle == SWIZZLE_128B && fill == 0 && (rank == 2 || rank == 3) &&
        (uintptr_t)address % 16 == 0 && (uintptr_t)map % 64 == 0;
    EmulatedTensor tensor = {address, {1, 1, 1}, {0, 0}};
    for (unsigned i = 0; i < rank && is_right; i++) {
        is_right = sizes[i] >= 1 && sizes[i] <= (1ull << 32) && box[i] == (i < 2 ? 64 : 1) && steps[i] == 1;
        tensor.sizes[i] = sizes[i];
        if (i + 1 < rank) {
            is_right = is_right && strides[i] % 16 == 0 && strides[i] < (1ull << 40) && strides[i] >= 2 * sizes[0];
            tensor.strides[i] = strides[i] / 2;
        }
    }
    if (!is_right) return INVALID_VALUE;
    // All of it is memory.
    const size_t elements = (tensor.sizes[2] - 1) * tensor.strides[1] + (tensor.sizes[1] - 1) * tensor.strides[0] + tensor.sizes[0];
    check_range((uintptr_t)address, 2 * elements, "a tensor map");
    memset(map, 0, MAP_BYTES);
    memcpy(map, &tensor, sizeof tensor);
    return SUCCESS;
}

// ---- The run-time compiler ----

API int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, 0; }
API int nvrtcCreateProgram(void** made, const char* text, const char*, int headers, const char* const*, const char* const*) {
    if (headers != 0) broken("a program with headers");
    return *made = new std::string(text), 0;
}
API int nvrtcCompileProgram(void* program, int count, const char* const* options) {
    std::string line;
    for (int i = 0; i < count; i++) {
        const std::string option = options[i];
        if (option.rfind("-D", 0) == 0) line += option + " ";
        if (option.rfind("--gpu-architecture=", 0) == 0 && option.substr(19) != (is_hopper() ? "sm_90a" : "sm_80"))
            broken("code for another card: %s", options[i]);
    }
    return *(std::string*)program = line + "\n" + *(std::string*)program, 0;
}
static int size_of(void* program, size_t* bytes) { return *bytes = ((std::string*)program)->size() + 1, 0; }
static int copy_of(void* program, char* to) {
    return memcpy(to, ((std::string*)program)->c_str(), ((std::string*)program)->size() + 1), 0;
}
API int nvrtcGetCUBINSize(void* program, size_t* bytes) { return size_of(program, bytes); }
API int nvrtcGetCUBIN(void* program, char* to) { return copy_of(program, to); }
API int nvrtcGetPTXSize(void* program, size_t* bytes) { return size_of(program, bytes); }
API int nvrtcGetPTX(void* program, char* to) { return copy_of(program, to); }
API int nvrtcGetProgramLogSize(void*, size_t* bytes) { return *bytes = 1, 0; }
API int nvrtcGetProgramLog(void*, char* to) { return *to = 0, 0; }
API int nvrtcDestroyProgram(void** program) { return delete (std::string*)*program, 0; }

// ---- Matrix products ----

// cublasStatus_t.
enum { BLAS_SUCCESS = 0, BLAS_INVALID_VALUE = 7, BLAS_NOT_SUPPORTED = 15 };
// cudaDataType_t.
enum { FLOAT = 0, BF16 = 14 };

struct Object {};
static auto& objects = *new std::set<Object*>;
struct Description : Object {
    int transposed[2] = {0, 0};
};
struct Layout : Object {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};
struct Preference : Object {
    uint32_t alignment[4] = {256, 256, 256, 256};
};
// They are of no GPU, and may be made and looked at by any thread.
template <typename Kind>
static Kind* keep(Kind* one) {
    std::lock_guard<std::recursive_mutex> alone(all);
    objects.insert(one);
    return one;
}
template <typename Kind>
static Kind* object(void* handle, const char* name) {
    std::lock_guard<std::recursive_mutex> alone(all);
    if (objects.count((Object*)(Kind*)handle) == 0) broken("%s of something that is not there, or not any more", name);
    return (Kind*)handle;
}
template <typename Kind>
static int drop(void* handle, const char* name) {
    Kind* one = object<Kind>(handle, name);
    std::lock_guard<std::recursive_mutex> alone(all);
    objects.erase(one);
    delete one;
    return BLAS_SUCCESS;
}

API size_t cublasLtGetVersion() { return 130000; }
API int cublasLtCreate(void** made) {
    Call call("cublasLtCreate");
    may_wait_for_the_device();
    Blas* handle = new Blas;
    handles.insert(handle);
    return *made = handle, BLAS_SUCCESS;
}
API int cublasLtDestroy(void* handle) {
    Call call("cublasLtDestroy");
    may_wait_for_the_device();
    return destroy(handles, handle, "cublasLtDestroy");
}
API int cublasLtMatmulDescCreate(void** made, int, int scale) {
    if (scale != FLOAT) broken("a product whose factors of scale are no floats");
    return *made = keep(new Description), BLAS_SUCCESS;
}
API int cublasLtMatmulDescDestroy(void* handle) { return drop<Description>(handle, "cublasLtMatmulDescDestroy"); }
API int cublasLtMatmulDescSetAttribute(void* handle, int attribute, const void* value, size_t bytes) {
    if ((attribute != 3 && attribute != 4) || bytes != 4) return BLAS_INVALID_VALUE;
    object<Description>(handle, "cublasLtMatmulDescSetAttribute")->transposed[attribute - 3] = *(const int*)value;
    return BLAS_SUCCESS;
}
API int cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    if (leading < (int64_t)rows) broken("a matrix of %lu rows, %ld apart", (unsigned long)rows, (long)leading);
    Layout* layout = keep(new Layout);
    layout->type = type, layout->rows = rows, layout->columns = columns, layout->leading = leading;
    return *made = layout, BLAS_SUCCESS;
}
API int cublasLtMatrixLayoutDestroy(void* handle) { return drop<Layout>(handle, "cublasLtMatrixLayoutDestroy"); }
API int cublasLtMatmulPreferenceCreate(void** made) { return *made = keep(new Preference), BLAS_SUCCESS; }
API int cublasLtMatmulPreferenceDestroy(void* handle) { return drop<Preference>(handle, "cublasLtMatmulPreferenceDestroy"); }
API int cublasLtMatmulPreferenceSetAttribute(void* handle, int attribute, const void* value, size_t bytes) {
    // The workspace, and alignments.
    if (attribute == 1 && bytes == 8) return BLAS_SUCCESS;
    if (attribute < 5 || attribute > 8 || bytes != 4) return BLAS_INVALID_VALUE;
    object<Preference>(handle, "cublasLtMatmulPreferenceSetAttribute")->alignment[attribute - 5] = *(const uint32_t*)value;
    return BLAS_SUCCESS;
}
struct Found {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};
// Of bfloat16 only what lies in steps of 16 bytes, so that there are products that it has not.
API int cublasLtMatmulAlgoGetHeuristic(
    void* handle, void*, void* a, void* b, void*, void* d, void* preference, int, void* found, int* count) {
    Call call("cublasLtMatmulAlgoGetHeuristic");
    known(handles, handle, "cublasLtMatmulAlgoGetHeuristic");
    const char* name = "cublasLtMatmulAlgoGetHeuristic";
    const Preference& asked = *object<Preference>(preference, name);
    const Layout* matrices[3] = {object<Layout>(a, name), object<Layout>(b, name), object<Layout>(d, name)};
    const uint32_t alignments[3] = {asked.alignment[0], asked.alignment[1], asked.alignment[3]};
    for (int i = 0; i < 3; i++) {
        const bool is_even = matrices[i]->leading % 8 == 0 && alignments[i] >= 16;
        if (matrices[i]->type == BF16 && !is_even) return *count = 0, BLAS_NOT_SUPPORTED;
    }
    *(Found*)found = Found{};
    return *count = 1, BLAS_SUCCESS;
}
static float element(const void* matrix, int type, int64_t place) {
    if (type == FLOAT) return ((const float*)matrix)[place];
    const uint32_t bits = (uint32_t)((const uint16_t*)matrix)[place] << 16;
    float value;
    return memcpy(&value, &bits, 4), value;
}
static void set_element(void* matrix, int type, int64_t place, float value) {
    if (type == FLOAT) {
        ((float*)matrix)[place] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t*)matrix)[place] = value != value ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static void check_matrix(const void* at, const Layout& matrix, const char* name) {
    const size_t bytes = matrix.type == BF16 ? 2 : 4;
    if (matrix.type == BF16 && (uintptr_t)at % 16 != 0) broken("%s of an address that it has no algorithm for", name);
    if (matrix.rows == 0 || matrix.columns == 0) return;
    check_range((uintptr_t)at, ((matrix.columns - 1) * matrix.leading + matrix.rows) * bytes, name);
}
API int cublasLtMatmul(
    void* handle, void* description, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
    const float* beta, const void* c, void*, void* d, void* d_layout, const void*, void* workspace, size_t, void* stream) {
    Call call("cublasLtMatmul");
    const char* name = "cublasLtMatmul";
    Blas* blas = known(handles, handle, name);
    if (c != d || workspace == nullptr) broken("a product that is not in place, or without a workspace");
    const Description how = *object<Description>(description, name);
    const Layout left = *object<Layout>(a_layout, name), right = *object<Layout>(b_layout, name);
    const Layout out = *object<Layout>(d_layout, name);
    const int64_t depth = how.transposed[0] ? left.rows : left.columns;
    const bool fits = (how.transposed[0] ? left.columns : left.rows) == out.rows &&
        (how.transposed[1] ? right.rows : right.columns) == out.columns &&
        (int64_t)(how.transposed[1] ? right.columns : right.rows) == depth;
    if (!fits) return BLAS_INVALID_VALUE;
    check_matrix(a, left, name), check_matrix(b, right, name), check_matrix(d, out, name);
    std::stringstream kind;
    for (const Layout& matrix : {left, right, out}) kind << matrix.type << " " << matrix.rows << " " << matrix.columns << " ";
    if (blas->loaded.insert(kind.str()).second) may_wait_for_the_device();
    const float scale = *alpha, before = *beta;
    enqueue(known(streams, stream, "cublasLtMatmul"), [=] {
        *(volatile char*)workspace = 0;
        for (int64_t column = 0; column < (int64_t)out.columns; column++)
            for (int64_t row = 0; row < (int64_t)out.rows; row++) {
                float sum = 0.0f;
                for (int64_t k = 0; k < depth; k++) {
                    const int64_t in_left = how.transposed[0] ? row * left.leading + k : k * left.leading + row;
                    const int64_t in_right = how.transposed[1] ? k * right.leading + column : column * right.leading + k;
                    sum += element(a, left.type, in_left) * element(b, right.type, in_right);
                }
                const int64_t place = column * out.leading + row;
                // What is not added to may be anything.
                const float there = before == 0.0f ? 0.0f : before * element(d, out.type, place);
                set_element(d, out.type, place, scale * sum + there);
            }
    });
    return BLAS_SUCCESS;
}
