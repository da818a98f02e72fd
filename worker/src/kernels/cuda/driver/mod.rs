//! What the CUDA kernels are run by: a GPU, or in tests a C++ compiler and this machine's memory.
//!
//! Everything above it, the launches included, is the same for both, so that it is tested where there is no GPU.

#![expect(unreachable_pub, reason = "the parent hands some of it on, and all of it is for the parent")]

mod blas;
mod cache;
mod compile;
mod device;
#[cfg(feature = "emulator")]
mod emulator;
mod libraries;
mod tape;

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

pub use self::compile::{
    CompileError, Compiled, architecture, compile_to_cubin, compile_to_ptx, compiler_version,
};
pub(super) use self::device::Device;
#[cfg(feature = "emulator")]
pub use self::emulator::Emulated;
#[cfg(feature = "emulator")]
pub(super) use self::emulator::Emulator;
pub use self::libraries::{Library, LibraryError, require};
pub use self::tape::{Operation, Tape};
use super::error::CudaError;
use super::source::Source;

/// A place in the device's memory, in bytes; 0 is none.
pub(crate) type Address = u64;

/// What launches have to know of a device.
#[derive(Clone, Debug)]
pub struct Properties {
    /// What it calls itself.
    pub name: String,
    /// Compute capability times ten: 90 for Hopper.
    pub architecture: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// The most dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Memory in all, in bytes.
    pub memory_bytes: usize,
}

/// A compiled translation unit, as the driver knows it.
#[derive(Clone, Copy, Debug)]
pub struct Module(usize);

/// A kernel of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel(usize);

/// How many blocks of how many threads, with how much dynamic shared memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in each direction.
    pub grid: [u32; 3],
    /// Threads of a block in each direction.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// A description of a matrix in memory for Hopper's copy engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(128))]
pub struct TensorMap(pub(super) [u64; 16]);

/// What a [`TensorMap`] describes: bfloat16 in up to three dimensions, the innermost first.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    /// The first element.
    pub address: Address,
    /// Elements in each dimension.
    pub sizes: Vec<u64>,
    /// Bytes from one element to the next in all dimensions but the innermost.
    pub strides: Vec<u64>,
    /// Elements that are copied at a time, in each dimension.
    pub tile: Vec<u32>,
}

/// An argument of a kernel.
#[derive(Clone, Debug)]
pub enum Argument {
    /// An address or an integer, in the lowest bytes.
    Word(u64),
    /// A float.
    Float(f32),
    /// A tensor map. Shared, as it is large, and steps keep their arguments.
    Map(Arc<TensorMap>),
}

/// Whether the kernel gets the same bits.
impl PartialEq for Argument {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Word(a), Self::Word(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => a.to_bits() == b.to_bits(),
            (Self::Map(a), Self::Map(b)) => a == b,
            _ => false,
        }
    }
}

impl From<u64> for Argument {
    fn from(address: u64) -> Self {
        Self::Word(address)
    }
}
impl From<i64> for Argument {
    fn from(value: i64) -> Self {
        Self::Word(value.cast_unsigned())
    }
}
impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self::Word(u64::from(value.cast_unsigned()))
    }
}
impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}
impl From<Arc<TensorMap>> for Argument {
    fn from(map: Arc<TensorMap>) -> Self {
        Self::Map(map)
    }
}

/// What a matrix in a dense product holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// `f32`.
    Float,
    /// bfloat16.
    Bf16,
}

/// One factor of a dense product, column-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factor {
    /// Where it starts.
    pub address: Address,
    /// Elements from one column to the next.
    pub leading: usize,
    /// Whether it is transposed before it is multiplied.
    pub transposed: bool,
}

/// d (m, n) = a (m, k) · b (k, n), or added to d; all column-major, a and b in the device's type for factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// The sizes (m, n, k).
    pub sizes: (usize, usize, usize),
    /// What a and b hold.
    pub factors: Scalar,
    /// The left factor.
    pub a: Factor,
    /// The right factor.
    pub b: Factor,
    /// Where the result goes, without gaps between its columns.
    pub d: Address,
    /// What it holds.
    pub result: Scalar,
    /// Whether it is added to d.
    pub add: bool,
    /// Whether `f32` factors may be rounded to TF32.
    pub tf32: bool,
}

/// Operations that are queued together.
#[derive(Clone, Copy, Debug)]
pub struct GraphHandle(usize);

/// A moment in the device's queue.
#[derive(Clone, Copy, Debug)]
pub struct Mark(usize);

/// What runs kernels. Operations are queued, in one queue; what they come to is known after a wait.
pub trait Driver: Debug + Send + Sync {
    /// What launches have to know of it.
    fn properties(&self) -> &Properties;
    /// Bytes of all memory that was handed out and not given back.
    fn held_bytes(&self) -> &AtomicUsize;
    /// Bytes that are free.
    ///
    /// # Errors
    /// If the device failed.
    fn free_bytes(&self) -> Result<usize, CudaError>;
    /// Zeroed memory.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or that the device failed.
    fn allocate(&self, bytes: usize) -> Result<Address, CudaError>;
    /// Gives memory back, after all operations before it.
    fn free(&self, address: Address, bytes: usize);
    /// Copies bytes to the device; they are taken before it returns.
    ///
    /// # Errors
    /// If the device failed.
    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), CudaError>;
    /// Copies bytes to the host, after all operations before it.
    ///
    /// # Errors
    /// If the device failed.
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), CudaError>;
    /// Copies bytes from one place of the device to another that does not overlap it.
    ///
    /// # Errors
    /// If the device failed.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), CudaError>;
    /// Sets bytes to zero.
    ///
    /// # Errors
    /// If the device failed.
    fn zero(&self, address: Address, bytes: usize) -> Result<(), CudaError>;
    /// Waits for all operations before it.
    ///
    /// # Errors
    /// The first failure of any of them.
    fn wait(&self) -> Result<(), CudaError>;
    /// Compiles and loads a translation unit.
    ///
    /// # Errors
    /// If it does not compile, or the device does not take it.
    fn load(&self, source: &Source) -> Result<Module, CudaError>;
    /// A kernel by its name.
    ///
    /// # Errors
    /// If the module has none of that name.
    fn kernel(&self, module: Module, name: &str) -> Result<Kernel, CudaError>;
    /// Queues a kernel.
    ///
    /// # Errors
    /// If the launch is refused.
    fn launch(&self, kernel: Kernel, launch: Launch, arguments: &[Argument]) -> Result<(), CudaError>;
    /// Whether it has a dense product for such sizes and addresses.
    ///
    /// # Errors
    /// If the device failed.
    fn has_product(&self, product: &Product) -> Result<bool, CudaError>;
    /// Queues a dense product.
    ///
    /// # Errors
    /// If the device failed, or has none for such sizes and addresses.
    fn product(&self, product: &Product) -> Result<(), CudaError>;
    /// Makes a graph of operations, which are not queued by that.
    ///
    /// # Errors
    /// If it cannot be made.
    fn graph(&self, tape: &Tape) -> Result<GraphHandle, CudaError>;
    /// Queues all operations of a graph. One that is queued still may be queued again.
    ///
    /// # Errors
    /// If the device failed.
    fn queue_graph(&self, graph: GraphHandle) -> Result<(), CudaError>;
    /// Gives a graph back, after all operations before it.
    fn free_graph(&self, graph: GraphHandle);
    /// Describes memory to the copy engine; `None` where there is no such engine.
    ///
    /// # Errors
    /// If the description is refused.
    fn tensor_map(&self, tensor: &Tensor) -> Result<Option<TensorMap>, CudaError>;
    /// Marks this moment in the queue.
    ///
    /// # Errors
    /// If the device failed.
    fn mark(&self) -> Result<Mark, CudaError>;
    /// Gives a mark back.
    fn free_mark(&self, mark: Mark);
    /// Milliseconds between two marks, after a wait for the later one.
    ///
    /// # Errors
    /// If the device failed.
    fn elapsed_ms(&self, from: Mark, to: Mark) -> Result<f32, CudaError>;
}
