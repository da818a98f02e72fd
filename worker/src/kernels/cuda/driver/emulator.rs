//! The kernels on the CPU: the same sources, compiled by a C++ compiler against `emulator/emulate.hpp`.
//!
//! It is slow, and meant for tests: kernels and the code that launches them run on machines without a GPU. Memory is this
//! process's, operations are done when they are asked for, and the products that a GPU does by cuBLASLt are refused, so
//! that the kernels of ours do them.

use std::collections::HashMap;
use std::ffi::{c_uint, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;
use tempfile::TempDir;

use super::super::error::CudaError;
use super::super::source::Source;
use super::{
    Address, Argument, CompileError, Driver, GraphHandle, Kernel, Launch, Mark, Module, Product, Properties,
    Tape, Tensor, TensorMap,
};

/// Integers and addresses, and floats, that `emulate_launch` takes.
const WORDS: usize = 24;
const FLOATS: usize = 8;

/// What allocations start at a multiple of, in bytes.
const ALIGNMENT: usize = 256;

type LaunchFunction =
    unsafe extern "C" fn(*mut c_void, *const c_uint, *const c_uint, c_uint, *const i64, *const f32);

/// Compiled units, for all emulators of the process: each takes some seconds.
#[derive(Default)]
struct Units {
    directory: Option<TempDir>,
    loaded: Vec<Loaded>,
    by_source: HashMap<String, usize>,
}

struct Loaded {
    code: Library,
    launch: LaunchFunction,
}

fn units() -> &'static Mutex<Units> {
    static UNITS: OnceLock<Mutex<Units>> = OnceLock::new();
    UNITS.get_or_init(Mutex::default)
}

/// A kernel that runs is alone: blocks have their shared memory in static variables.
static RUNNING: Mutex<()> = Mutex::new(());

/// What the device in whose place this machine is would have.
#[derive(Clone, Copy, Debug)]
pub struct Emulated {
    /// Compute capability times ten: attention of 90 is Hopper's. The experts' products are not, which have a program of their
    /// own that emulates them.
    pub architecture: u32,
    /// The most dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Memory in all, in bytes.
    pub memory_bytes: usize,
    /// What other programs have of it, in bytes.
    pub others_bytes: &'static AtomicUsize,
    /// Graphs that it refuses to make.
    pub graphs_refused: usize,
}

/// Nobody has anything.
static NO_OTHERS: AtomicUsize = AtomicUsize::new(0);

impl Default for Emulated {
    /// Not Hopper, but with its shared memory, and no limit to the other.
    fn default() -> Self {
        Self {
            architecture: 80,
            shared_bytes: 227 * 1024,
            memory_bytes: usize::MAX,
            others_bytes: &NO_OTHERS,
            graphs_refused: 0,
        }
    }
}

/// This machine's memory and processor in a GPU's place.
#[derive(Debug)]
pub(crate) struct Emulator {
    properties: Properties,
    others_bytes: &'static AtomicUsize,
    graphs_refused: usize,
    held_bytes: AtomicUsize,
    compiler: String,
    /// The function that starts each kernel, by the kernel's address.
    launches: Mutex<HashMap<usize, LaunchFunction>>,
    /// The operations of each graph.
    graphs: Mutex<HashMap<usize, Tape>>,
    graphs_made: AtomicUsize,
}

impl Emulator {
    /// With the C++ compiler that `$CXX` names, or `c++`.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn new(emulated: Emulated) -> Result<Self, CudaError> {
        let compiler =
            std::env::var("CXX").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "c++".to_owned());
        let found =
            Command::new(&compiler).arg("--version").output().is_ok_and(|output| output.status.success());
        if !found {
            return Err(CudaError::NoCompiler(compiler));
        }
        let Emulated { architecture, shared_bytes, memory_bytes, others_bytes, graphs_refused } = emulated;
        let properties = Properties {
            name: "emulated".to_owned(),
            architecture,
            multiprocessors: 2,
            shared_bytes,
            memory_bytes,
        };
        let held_bytes = AtomicUsize::new(0);
        let (launches, graphs, graphs_made) = (Mutex::default(), Mutex::default(), AtomicUsize::new(0));
        Ok(Self {
            properties,
            others_bytes,
            graphs_refused,
            held_bytes,
            compiler,
            launches,
            graphs,
            graphs_made,
        })
    }

    fn compile(&self, units: &mut Units, source: &Source) -> Result<Loaded, CudaError> {
        let failed =
            |reason: String| CudaError::Driver { operation: "compiling kernels for the CPU", reason };
        let directory = match &units.directory {
            Some(directory) => directory,
            None => {
                let directory = tempfile::tempdir().map_err(|error| failed(error.to_string()))?;
                for (name, text) in [
                    ("emulate.hpp", include_str!("../emulator/emulate.hpp")),
                    ("mma.hpp", include_str!("../emulator/mma.hpp")),
                    ("hopper.hpp", include_str!("../emulator/hopper.hpp")),
                ] {
                    std::fs::write(directory.path().join(name), text)
                        .map_err(|error| failed(error.to_string()))?;
                }
                units.directory.insert(directory)
            }
        };
        let number = units.loaded.len();
        let text: PathBuf = directory.path().join(format!("{}-{number}.cpp", source.name));
        let object = text.with_extension("so");
        std::fs::write(&text, &source.text).map_err(|error| failed(error.to_string()))?;
        // Hidden, so that a library's static variables are its own; no fused multiply-adds beyond what the sources ask
        // for, as the CPU's kernels have none.
        let mut command = Command::new(&self.compiler);
        command.args([
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-w",
        ]);
        command.args(["-DSANDERLING_EMULATE=1"]).args(&source.defines).arg("-I").arg(directory.path());
        let output =
            command.arg(&text).arg("-o").arg(&object).output().map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(CudaError::Compile(CompileError {
                name: source.name,
                architecture: "the CPU".to_owned(),
                status: output.status.to_string(),
                log: String::from_utf8_lossy(&output.stderr).into_owned(),
            }));
        }
        // SAFETY: the library was just made of our own sources; it has no code that runs when it is loaded but the
        // initialisation of empty vectors.
        let library = unsafe { Library::new(&object) }.map_err(|error| failed(error.to_string()))?;
        // SAFETY: the function has that type in emulate.hpp, and lives as long as the library, which is never dropped.
        let launch = unsafe { library.get::<LaunchFunction>(b"emulate_launch\0") };
        let launch = *launch.map_err(|error| failed(error.to_string()))?;
        Ok(Loaded { code: library, launch })
    }
}

fn layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes, ALIGNMENT).expect("an allocation fits the address space")
}

impl Driver for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn held_bytes(&self) -> &AtomicUsize {
        &self.held_bytes
    }

    fn free_bytes(&self) -> Result<usize, CudaError> {
        let taken = self.held_bytes.load(Ordering::Relaxed) + self.others_bytes.load(Ordering::Relaxed);
        Ok(self.properties.memory_bytes.saturating_sub(taken))
    }

    fn allocate(&self, bytes: usize) -> Result<Address, CudaError> {
        if bytes == 0 {
            return Ok(0);
        }
        let (free, total) = (self.free_bytes()?, self.properties.memory_bytes);
        let none = CudaError::OutOfMemory { operation: "a buffer", asked: Some(bytes), free, total };
        if bytes > free {
            return Err(none);
        }
        // SAFETY: the size is not zero.
        let address = unsafe { std::alloc::alloc_zeroed(layout(bytes)) };
        if address.is_null() {
            return Err(none);
        }
        Ok(address.expose_provenance() as u64)
    }

    fn free(&self, address: Address, bytes: usize) {
        if address != 0 {
            // SAFETY: `allocate` gave the address for as many bytes, and its owner is being dropped.
            unsafe {
                std::alloc::dealloc(std::ptr::with_exposed_provenance_mut(address as usize), layout(bytes))
            };
        }
    }

    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), CudaError> {
        if !bytes.is_empty() {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(to as usize);
            // SAFETY: the buffers check that a range lies in its allocation.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        }
        Ok(())
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), CudaError> {
        if !bytes.is_empty() {
            let from = std::ptr::with_exposed_provenance::<u8>(from as usize);
            // SAFETY: as in `upload`.
            unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        }
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), CudaError> {
        if bytes > 0 {
            let from = std::ptr::with_exposed_provenance::<u8>(from as usize);
            let to = std::ptr::with_exposed_provenance_mut::<u8>(to as usize);
            // SAFETY: as in `upload`; the ranges are of two allocations.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        }
        Ok(())
    }

    fn zero(&self, address: Address, bytes: usize) -> Result<(), CudaError> {
        if bytes > 0 {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
            // SAFETY: as in `upload`.
            unsafe { std::ptr::write_bytes(to, 0, bytes) };
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn load(&self, source: &Source) -> Result<Module, CudaError> {
        let key = format!("{:?}\n{}", source.defines, source.text);
        let mut units = units().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&number) = units.by_source.get(&key) {
            return Ok(Module(number));
        }
        let loaded = self.compile(&mut units, source)?;
        units.loaded.push(loaded);
        let number = units.loaded.len() - 1;
        units.by_source.insert(key, number);
        Ok(Module(number))
    }

    fn kernel(&self, module: Module, name: &str) -> Result<Kernel, CudaError> {
        let units = units().lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = &units.loaded[module.0];
        // SAFETY: only the address is taken here; the library is never dropped.
        let symbol = unsafe { loaded.code.get::<unsafe extern "C" fn()>(name.as_bytes()) };
        let symbol = symbol
            .map_err(|error| CudaError::NoKernel { name: name.to_owned(), reason: error.to_string() })?;
        let address = *symbol as *const c_void as usize;
        self.launches.lock().unwrap_or_else(PoisonError::into_inner).insert(address, loaded.launch);
        Ok(Kernel(address))
    }

    fn launch(&self, kernel: Kernel, launch: Launch, arguments: &[Argument]) -> Result<(), CudaError> {
        let (mut words, mut floats) = ([0i64; WORDS], [0f32; FLOATS]);
        let (mut words_used, mut floats_used) = (0, 0);
        for argument in arguments {
            match argument {
                Argument::Word(word) => {
                    words[words_used] = word.cast_signed();
                    words_used += 1;
                }
                Argument::Float(float) => {
                    floats[floats_used] = *float;
                    floats_used += 1;
                }
                Argument::Map(_) => unreachable!("the emulator makes no tensor maps"),
            }
        }
        assert!(launch.shared_bytes <= self.properties.shared_bytes, "{launch:?} has too much shared memory");
        let function = self.launches.lock().unwrap_or_else(PoisonError::into_inner)[&kernel.0];
        let kernel = std::ptr::with_exposed_provenance_mut(kernel.0);
        let _alone = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the kernel belongs to the library that the function is of, the arrays have the lengths that it reads,
        // and the arguments are those of the kernel, which the tests of every operation show.
        unsafe {
            function(
                kernel,
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared_bytes,
                words.as_ptr(),
                floats.as_ptr(),
            );
        }
        Ok(())
    }

    fn has_product(&self, _product: &Product) -> Result<bool, CudaError> {
        Ok(false)
    }

    fn product(&self, product: &Product) -> Result<(), CudaError> {
        unreachable!("the emulator has no products, and was asked for {product:?}")
    }

    fn graph(&self, tape: &Tape) -> Result<GraphHandle, CudaError> {
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = self.graphs_made.fetch_add(1, Ordering::Relaxed);
        if handle < self.graphs_refused {
            return Err(CudaError::Driver { operation: "making a graph", reason: "refused".to_owned() });
        }
        graphs.insert(handle, tape.clone());
        Ok(GraphHandle(handle))
    }

    fn queue_graph(&self, graph: GraphHandle) -> Result<(), CudaError> {
        let graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        graphs[&graph.0].operations().try_for_each(|operation| operation.queue(self))
    }

    fn free_graph(&self, graph: GraphHandle) {
        let removed = self.graphs.lock().unwrap_or_else(PoisonError::into_inner).remove(&graph.0);
        assert!(removed.is_some(), "{graph:?} was given back twice");
    }

    fn tensor_map(&self, _tensor: &Tensor) -> Result<Option<TensorMap>, CudaError> {
        Ok(None)
    }

    fn mark(&self) -> Result<Mark, CudaError> {
        Ok(Mark(0))
    }

    fn free_mark(&self, _mark: Mark) {}

    fn elapsed_ms(&self, _from: Mark, _to: Mark) -> Result<f32, CudaError> {
        Ok(0.0)
    }
}
