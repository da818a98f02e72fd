//! A GPU, through CUDA's driver.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};

use super::super::error::CudaError;
use super::super::source::Source;
use super::blas::{self, Blas};
use super::cache::Entry;
use super::{
    Address, Argument, Driver, GraphHandle, Kernel, Launch, Library, Mark, Module, Operation, Product,
    Properties, Tape, Tensor, TensorMap, compile, libraries,
};

/// The most arguments of a kernel.
const ARGUMENTS_MAX: usize = 24;

/// Held while a graph is recorded, and while a GPU is opened or closed, for which cuBLASLt waits for the whole device, or kernels
/// are loaded, of ours or of cuBLASLt's, for which the driver may: CUDA forbids that while any of a device's queues records, and it
/// ends the recording. Locked after `Device::modules`, and before what products share.
static RECORDING: Mutex<()> = Mutex::new(());

/// Waits until nobody records, opens, loads or closes, and has others wait.
fn record_or_open_alone() -> MutexGuard<'static, ()> {
    RECORDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One GPU with one queue.
#[derive(Debug)]
pub(crate) struct Device {
    properties: Properties,
    held_bytes: AtomicUsize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    blas: Blas,
    /// The units that are loaded, by the names of their cache entries.
    modules: Mutex<HashMap<String, Module>>,
    /// The dynamic shared memory that each kernel has been allowed.
    allowed: Mutex<HashMap<Kernel, u32>>,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs, and every method makes it
// so first (`bind`).
unsafe impl Send for Device {}
// SAFETY: as above; the driver and cuBLASLt are safe to call from several threads, and what is ours is behind a lock.
unsafe impl Sync for Device {}

/// Says what failed. Any call may find the memory gone, as the driver takes its own bit by bit.
fn failed(operation: &'static str) -> impl Fn(result::DriverError) -> CudaError {
    move |error| match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => out_of_memory(operation, None),
        _ => refused(operation, error),
    }
}

fn refused(operation: &'static str, error: result::DriverError) -> CudaError {
    let words =
        error.error_string().map_or_else(|_| String::new(), |words| words.to_string_lossy().into_owned());
    CudaError::Driver { operation, reason: format!("{:?}: {words}", error.0) }
}

/// What there is of the current context's memory, after an operation had not enough.
pub(super) fn out_of_memory(operation: &'static str, asked: Option<usize>) -> CudaError {
    match result::mem_get_info() {
        Ok((free, total)) => CudaError::OutOfMemory { operation, asked, free, total },
        // A GPU that could not be opened for it says no numbers.
        Err(_) => CudaError::Driver { operation, reason: "the GPU has no memory for it".to_owned() },
    }
}

impl Device {
    /// The GPU of that number.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) fn new(ordinal: usize) -> Result<Self, CudaError> {
        let wanted = [Library::Driver, Library::Nvrtc, Library::CublasLt];
        libraries::loaded(&wanted)?;
        match result::init() {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => {
                return Err(CudaError::NoDevice { ordinal, count: 0 });
            }
            initialised => initialised.map_err(failed("starting CUDA"))?,
        }
        check_versions()?;
        libraries::complete(&wanted)?;
        let count = result::device::get_count().map_err(failed("counting the GPUs"))?;
        let count = usize::try_from(count).unwrap_or(0);
        let number = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
        let number = number.ok_or(CudaError::NoDevice { ordinal, count })?;
        let device = result::device::get(number).map_err(failed("finding the GPU"))?;
        let properties = properties(device)?;
        // SAFETY: the device is one of the driver's; the context is released below, or when this is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("opening the GPU"))?;
        Self::in_context(properties, device, context).inspect_err(|_| {
            // SAFETY: the context was retained above, and nothing that was made in it is left but what ends with it.
            let _ = unsafe { result::primary_ctx::release(device) };
        })
    }

    fn in_context(
        properties: Properties,
        device: sys::CUdevice,
        context: sys::CUcontext,
    ) -> Result<Self, CudaError> {
        let _none = record_or_open_alone();
        // SAFETY: the context was just made.
        unsafe { result::ctx::set_current(context) }.map_err(failed("opening the GPU"))?;
        let blas = Blas::new()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .inspect_err(|_| blas.destroy())
            .map_err(failed("making a queue"))?;
        let held_bytes = AtomicUsize::new(0);
        let (modules, allowed) = (Mutex::default(), Mutex::default());
        Ok(Self { properties, held_bytes, device, context, stream, blas, modules, allowed })
    }

    /// Makes the context the calling thread's.
    fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as this.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("choosing the GPU"))
    }

    /// Queues a kernel, or writes it into the graph that the queue is recorded in.
    fn launch_in(
        &self,
        stream: sys::CUstream,
        kernel: Kernel,
        launch: Launch,
        arguments: &[Argument],
    ) -> Result<(), CudaError> {
        self.allow(kernel, launch.shared_bytes)?;
        assert!(arguments.len() <= ARGUMENTS_MAX, "{} arguments", arguments.len());
        let mut pointers = [std::ptr::null_mut::<c_void>(); ARGUMENTS_MAX];
        for (pointer, argument) in pointers.iter_mut().zip(arguments) {
            // The driver reads as many bytes as the kernel's parameter has; the lowest come first.
            *pointer = match argument {
                Argument::Word(word) => std::ptr::from_ref(word).cast_mut().cast(),
                Argument::Float(float) => std::ptr::from_ref(float).cast_mut().cast(),
                Argument::Map(map) => std::ptr::from_ref(map.as_ref()).cast_mut().cast(),
            };
        }
        let Launch { grid, block, shared_bytes } = launch;
        let (grid, block) = ((grid[0], grid[1], grid[2]), (block[0], block[1], block[2]));
        let function = kernel.0 as sys::CUfunction;
        let pointers = &mut pointers[..arguments.len()];
        // SAFETY: the arguments are those of the kernel, in its order, which the tests of every operation show; they
        // are copied by the call.
        unsafe { result::launch_kernel(function, grid, block, shared_bytes, stream, pointers) }
            .map_err(failed("starting a kernel"))
    }

    fn zero_in(&self, stream: sys::CUstream, address: Address, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range lies in an allocation, see the buffers.
        unsafe { result::memset_d8_async(address, 0, bytes, stream) }.map_err(failed("clearing memory"))
    }

    /// Writes operations into a graph, by a queue that nobody else knows: other threads go on queueing meanwhile.
    fn record(&self, tape: &Tape, stream: sys::CUstream) -> Result<sys::CUgraph, CudaError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the queue was just made, and records nothing yet.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(failed("beginning a graph"))?;
        let recorded = tape.operations().try_for_each(|operation| match operation {
            Operation::Launch { kernel, launch, arguments } => {
                self.launch_in(stream, kernel, launch, arguments)
            }
            Operation::Product(product) => self.blas.product(&product, stream),
            Operation::Zero { address, bytes } => self.zero_in(stream, address, bytes),
        });
        // SAFETY: the queue records since the call above.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(failed("ending a graph"));
        // What was refused first says more than that the recording is spoilt.
        recorded.and_then(|()| graph.clone()).inspect_err(|_| {
            if let Ok(graph) = graph {
                // SAFETY: the graph was just made, and nothing else knows it.
                let _ = unsafe { result::graph::destroy(graph) };
            }
        })
    }

    fn load_code(code: &[u8]) -> Result<Module, CudaError> {
        let _none = record_or_open_alone();
        // SAFETY: the code is what NVRTC made, whole (its hash was compared), and is copied by the call.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
        Ok(Module(module.map_err(failed("loading kernels"))? as usize))
    }

    /// Loads a unit from the cache, or compiles it.
    fn load_unit(source: &Source, architecture: &str, entry: &Entry) -> Result<Module, CudaError> {
        if let Some(module) = entry.read().and_then(|code| Self::load_code(&code).ok()) {
            return Ok(module);
        }
        match compile::compile_to_cubin(source, architecture) {
            Ok(compiled) => {
                entry.write(&compiled.code);
                Self::load_code(&compiled.code)
            }
            // A GPU that is newer than the compiler runs what the driver makes of the newest it knows.
            Err(error) if error.status.contains("INVALID_OPTION") => {
                let mut code = compile::compile_to_ptx(source, "compute_90")?.code;
                code.push(0);
                entry.write(&code);
                Self::load_code(&code)
            }
            Err(error) if error.status.contains("BUILTIN_OPERATION_FAILURE") => Err(CudaError::NoBuiltins),
            Err(error) => Err(error.into()),
        }
    }

    /// Allows a kernel the dynamic shared memory of a launch. Without being asked a kernel has 48 KiB, from which its static
    /// memory goes off; so it is asked for whatever is wanted.
    fn allow(&self, kernel: Kernel, bytes: u32) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let mut allowed = self.allowed.lock().expect("nothing panics while it holds the lock");
        if allowed.get(&kernel).is_none_or(|&before| before < bytes) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the kernel is one that `kernel` found.
            unsafe {
                result::function::set_function_attribute(kernel.0 as sys::CUfunction, attribute, bytes as i32)
            }
            .map_err(failed("asking for shared memory"))?;
            allowed.insert(kernel, bytes);
        }
        Ok(())
    }
}

/// Memory of the current context, which holds anything.
pub(super) fn memory(bytes: usize) -> Result<Address, CudaError> {
    // SAFETY: callers write the memory before anything reads it.
    unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => out_of_memory("a buffer", Some(bytes)),
        _ => refused("asking for memory", error),
    })
}

/// The major version of CUDA whose functions are called: older libraries lack some of them, and the bindings panic then.
const CUDA_MAJOR: i32 = 13;

/// All three libraries are of this major version or a later one, and a driver runs what compilers of its own major version make, or
/// of older ones.
fn check_versions() -> Result<(), CudaError> {
    let mut driver = 0;
    // SAFETY: the pointer is valid for the call.
    unsafe { sys::cuDriverGetVersion(&raw mut driver) }
        .result()
        .map_err(failed("asking for the driver's version"))?;
    let libraries = [("libnvrtc", compile::compiler_version().0), ("libcublasLt", blas::major_version())];
    for (library, major) in libraries {
        if major < CUDA_MAJOR {
            return Err(CudaError::OldLibrary { library, major, needed: CUDA_MAJOR });
        }
    }
    let needed = libraries.iter().fold(CUDA_MAJOR, |most, &(_, major)| most.max(major));
    if driver / 1000 < needed { Err(CudaError::OldDriver { driver, needed }) } else { Ok(()) }
}

fn properties(device: sys::CUdevice) -> Result<Properties, CudaError> {
    use sys::CUdevice_attribute as Attribute;
    let attribute = |attribute| {
        // SAFETY: the device is one of the driver's.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        value.map(i32::unsigned_abs).map_err(failed("asking about the GPU"))
    };
    let name = result::device::get_name(device).map_err(failed("asking about the GPU"))?;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if major < 8 {
        return Err(CudaError::TooOld { name, major, minor });
    }
    Ok(Properties {
        name,
        architecture: major * 10 + minor,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }.map_err(failed("asking about the GPU"))?,
    })
}

impl Driver for Device {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn held_bytes(&self) -> &AtomicUsize {
        &self.held_bytes
    }

    fn free_bytes(&self) -> Result<usize, CudaError> {
        self.bind()?;
        Ok(result::mem_get_info().map_err(failed("asking for free memory"))?.0)
    }

    fn allocate(&self, bytes: usize) -> Result<Address, CudaError> {
        if bytes == 0 {
            return Ok(0);
        }
        self.bind()?;
        let address = memory(bytes)?;
        self.zero(address, bytes).inspect_err(|_| self.free(address, bytes))?;
        Ok(address)
    }

    fn free(&self, address: Address, _bytes: usize) {
        if address == 0 || self.bind().is_err() {
            return;
        }
        // That freeing waits for what uses the memory is not promised. If this wait fails, so did what used it.
        let _ = self.wait();
        // SAFETY: the address came from `allocate`, its owner is being dropped, and nothing that was queued uses it any more.
        if let Err(error) = unsafe { result::free_sync(address) } {
            tracing::debug!("memory of the GPU was not given back: {error}");
        }
    }

    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), CudaError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's buffer is as long as it says, and it is read no more after the wait below. Whether the call itself
        // waits until pageable memory is read is left to CUDA.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.map_err(failed("copying to the GPU"))?;
        // Rejected: pinned memory to copy into first, which needs marks for when it may be used again, for uploads that are few
        // and small: a step's tokens, and what was exchanged. Graphs are recorded in queues of their own, and hold no uploads,
        // so that the wait is in none.
        self.wait()
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), CudaError> {
        if bytes.is_empty() {
            return self.wait();
        }
        self.bind()?;
        // SAFETY: the caller's buffer is as long as it says, and the wait below is for the copy too.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) }
            .map_err(failed("copying from the GPU"))?;
        self.wait()
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both ranges lie in allocations, see the buffers.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(failed("copying on the GPU"))
    }

    fn zero(&self, address: Address, bytes: usize) -> Result<(), CudaError> {
        self.bind()?;
        self.zero_in(self.stream, address, bytes)
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the queue lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("a computation on the GPU"))
    }

    fn load(&self, source: &Source) -> Result<Module, CudaError> {
        self.bind()?;
        let architecture = compile::architecture(self.properties.architecture);
        let options = compile::options(source, &architecture);
        let entry = Entry::new(&source.text, &options, compile::compiler_version());
        // Workers that begin together want the same units in the same order: one of them compiles, the others wait for it.
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&module) = modules.get(entry.name()) {
            return Ok(module);
        }
        let module = Self::load_unit(source, &architecture, &entry)?;
        modules.insert(entry.name().to_owned(), module);
        Ok(module)
    }

    fn kernel(&self, module: Module, name: &str) -> Result<Kernel, CudaError> {
        self.bind()?;
        let no_kernel = |reason: String| CudaError::NoKernel { name: name.to_owned(), reason };
        let c_name = CString::new(name).map_err(|error| no_kernel(error.to_string()))?;
        let _none = record_or_open_alone();
        // SAFETY: modules are not unloaded before this is dropped.
        let function = unsafe { result::module::get_function(module.0 as sys::CUmodule, c_name) };
        function.map(|function| Kernel(function as usize)).map_err(|error| match error.0 {
            // Kernels are loaded when they are first asked for.
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => out_of_memory("loading kernels", None),
            refused => no_kernel(format!("{refused:?}")),
        })
    }

    fn launch(&self, kernel: Kernel, launch: Launch, arguments: &[Argument]) -> Result<(), CudaError> {
        self.bind()?;
        self.launch_in(self.stream, kernel, launch, arguments)
    }

    fn has_product(&self, product: &Product) -> Result<bool, CudaError> {
        self.bind()?;
        self.blas.has(product)
    }

    fn product(&self, product: &Product) -> Result<(), CudaError> {
        self.bind()?;
        // cuBLASLt loads kernels when it first needs them.
        let _none = (!self.blas.has_queued(product)).then(record_or_open_alone);
        self.blas.product(product, self.stream)
    }

    fn graph(&self, tape: &Tape) -> Result<GraphHandle, CudaError> {
        self.bind()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("making a queue for a graph"))?;
        let recorded = {
            let _only = record_or_open_alone();
            self.record(tape, stream)
        };
        // SAFETY: the queue was made above, and nothing was queued: what it was given is in the graph. A queue that is not
        // destroyed is no reason to do without the graph.
        let _ = unsafe { result::stream::destroy(stream) };
        let recorded = recorded?;
        let flags = sys::CUgraphInstantiate_flags_enum(0);
        // SAFETY: the graph was just recorded.
        let made = unsafe { result::graph::instantiate(recorded, flags) };
        // SAFETY: what was made of the graph does not need it any more.
        let _ = unsafe { result::graph::destroy(recorded) };
        Ok(GraphHandle(made.map_err(failed("making a graph"))? as usize))
    }

    fn queue_graph(&self, graph: GraphHandle) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the graph came from `graph` and was not given back. Its products use the workspace that all products do,
        // so that it must not come between the launches of one.
        self.blas
            .alone(|| unsafe { result::graph::launch(graph.0 as sys::CUgraphExec, self.stream) })
            .map_err(failed("queueing a graph"))
    }

    fn free_graph(&self, graph: GraphHandle) {
        // It may be running.
        if self.wait().is_err() {
            return;
        }
        // SAFETY: the graph came from `graph`, its owner is being dropped, and the wait is over.
        if let Err(error) = unsafe { result::graph::exec_destroy(graph.0 as sys::CUgraphExec) } {
            tracing::debug!("a graph was not given back: {error}");
        }
    }

    fn tensor_map(&self, tensor: &Tensor) -> Result<Option<TensorMap>, CudaError> {
        if self.properties.architecture < 90 {
            return Ok(None);
        }
        self.bind()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let rank = tensor.sizes.len();
        assert!(
            tensor.strides.len() + 1 == rank && tensor.tile.len() == rank,
            "{tensor:?} has no single rank"
        );
        let ones = vec![1u32; rank];
        // SAFETY: all arrays have the rank's length, the strides one less, as the call asks; the map is written by it.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                rank as u32,
                tensor.address as *mut c_void,
                tensor.sizes.as_ptr(),
                tensor.strides.as_ptr(),
                tensor.tile.as_ptr(),
                ones.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed("describing a matrix"))?;
        Ok(Some(TensorMap(map.opaque)))
    }

    fn mark(&self) -> Result<Mark, CudaError> {
        self.bind()?;
        let event =
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("making a mark"))?;
        let mark = Mark(event as usize);
        // SAFETY: the event was just made.
        unsafe { result::event::record(event, self.stream) }
            .map_err(failed("making a mark"))
            .inspect_err(|_| self.free_mark(mark))?;
        Ok(mark)
    }

    fn free_mark(&self, mark: Mark) {
        // It may be in the queue.
        let _ = self.wait();
        // SAFETY: the event came from `mark`, and its owner is being dropped.
        if let Err(error) = unsafe { result::event::destroy(mark.0 as sys::CUevent) } {
            tracing::debug!("a mark was not given back: {error}");
        }
    }

    fn elapsed_ms(&self, from: Mark, to: Mark) -> Result<f32, CudaError> {
        self.bind()?;
        let (from, to) = (from.0 as sys::CUevent, to.0 as sys::CUevent);
        // SAFETY: both events came from `mark`, and their owners hold them.
        let elapsed =
            unsafe { result::event::synchronize(to).and_then(|()| result::event::elapsed(from, to)) };
        elapsed.map_err(failed("measuring time"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _none = record_or_open_alone();
        let bound = self.bind();
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing uses the queue, the modules or the context from here on. The context is released whatever fails before:
        // one that is broken is made anew only when nobody holds it any more.
        let released = unsafe {
            let closed = bound.and_then(|()| {
                let waited = result::stream::synchronize(self.stream);
                self.blas.destroy();
                let destroyed = result::stream::destroy(self.stream);
                // The context may be somebody else's too, and keep them.
                let unloaded = modules
                    .drain()
                    .try_for_each(|(_, module)| result::module::unload(module.0 as sys::CUmodule));
                waited.and(destroyed).and(unloaded).map_err(failed("closing the GPU"))
            });
            closed.and(result::primary_ctx::release(self.device).map_err(failed("closing the GPU")))
        };
        if let Err(error) = released {
            tracing::debug!("the GPU was not closed in order: {error}");
        }
    }
}
