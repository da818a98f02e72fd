//! Dense products through cuBLASLt.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::{result as cuda, sys as cuda_sys};

use super::super::error::CudaError;
use super::device::{memory, out_of_memory};
use super::{Address, Factor, Product, Scalar};

/// Memory that products may use, in bytes: what cuBLAS recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The largest alignment that cuBLASLt asks about, in bytes.
const ALIGNMENT_MAX: u64 = 256;

/// A handle with a workspace, and what each shape of product is best done by.
#[derive(Debug)]
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    shared: Mutex<Shared>,
}

/// What all products share, whatever thread queues them. The lock is held until a product is queued: it may be several
/// launches, which hand on in the workspace what they come to (parts of a split sum, and the counters by which blocks wait
/// for each other), and no launch of another product may come between them. A block whose counter was overwritten would
/// wait for ever.
#[derive(Debug)]
struct Shared {
    workspace: cuda_sys::CUdeviceptr,
    /// `None`: there is nothing for such a product. At most [`PLANS_MAX`].
    plans: HashMap<Key, Option<Plan>>,
}

/// The most shapes that plans are kept for; with more, all are made anew. A run has some dozens, and one of each for every number
/// of tokens that its evaluations end with.
const PLANS_MAX: usize = 4096;

/// The library's major version.
pub(super) fn major_version() -> i32 {
    // SAFETY: it takes nothing, and only reads.
    let version = unsafe { sys::cublasLtGetVersion() };
    i32::try_from(major_of(version)).unwrap_or(i32::MAX)
}

/// 13.1.2 is 130102; up to version 11, 11.5.2 was 11502.
const fn major_of(version: usize) -> usize {
    if version < 100_000 { version / 1000 } else { version / 10_000 }
}

/// Everything about a product but its addresses, of which only the alignment matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    sizes: (usize, usize, usize),
    a: (usize, bool, u32),
    b: (usize, bool, u32),
    d: u32,
    factors: Scalar,
    result: Scalar,
    tf32: bool,
}

/// The descriptions of a product and the algorithm for it.
#[derive(Debug)]
struct Plan {
    operation: Operation,
    a: Layout,
    b: Layout,
    d: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Whether its kernels are loaded.
    was_queued: bool,
}

/// Something of the library's that goes when it is dropped.
macro_rules! owned {
    ($(#[$doc:meta])* $name:ident($handle:ty), $destroy:path) => {
        $(#[$doc])*
        #[derive(Debug)]
        struct $name($handle);

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: it was made by whoever made this, and is used no more. A failure would leave memory to the process's end.
                let _ = unsafe { $destroy(self.0) };
            }
        }
    };
}
owned!(/// What a product does.
    Operation(sys::cublasLtMatmulDesc_t), result::destroy_matmul_desc);
owned!(/// How a matrix lies.
    Layout(sys::cublasLtMatrixLayout_t), result::destroy_matrix_layout);
owned!(/// What an algorithm is to have.
    Preference(sys::cublasLtMatmulPreference_t), result::destroy_matmul_pref);

fn failed(operation: &'static str) -> impl Fn(result::CublasError) -> CudaError {
    move |error| match error.0 {
        sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => out_of_memory(operation, None),
        status => CudaError::Blas { operation, status: format!("{status:?}") },
    }
}

fn alignment(address: Address) -> u32 {
    // At most 256, so that it fits.
    (1 << address.trailing_zeros().min(ALIGNMENT_MAX.trailing_zeros())) as u32
}

impl Key {
    fn new(product: &Product) -> Self {
        let factor = |factor: &Factor| (factor.leading, factor.transposed, alignment(factor.address));
        Self {
            sizes: product.sizes,
            a: factor(&product.a),
            b: factor(&product.b),
            d: alignment(product.d),
            factors: product.factors,
            result: product.result,
            tf32: product.tf32,
        }
    }

    fn plan(&self, handle: sys::cublasLtHandle_t) -> Result<Option<Plan>, CudaError> {
        use sys::cublasComputeType_t as Compute;
        let compute = if self.tf32 && self.factors == Scalar::Float {
            Compute::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            Compute::CUBLAS_COMPUTE_32F
        };
        let operation = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F);
        let operation = Operation(operation.map_err(failed("describing a product"))?);
        let ((m, n, k), (a_leading, a_transposed, _), (b_leading, b_transposed, _)) =
            (self.sizes, self.a, self.b);
        transpose(
            &operation,
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            a_transposed,
        )?;
        transpose(
            &operation,
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB,
            b_transposed,
        )?;
        let a = layout(self.factors, (m, k), a_transposed, a_leading)?;
        let b = layout(self.factors, (k, n), b_transposed, b_leading)?;
        let d = layout(self.result, (m, n), false, m)?;
        let preference = self.preference()?;
        // SAFETY: everything was made above and is not freed yet.
        let found = unsafe {
            result::get_matmul_algo_heuristic(handle, operation.0, a.0, b.0, d.0, d.0, preference.0)
        };
        match found {
            Ok(found) => Ok(Some(Plan { operation, a, b, d, algorithm: found.algo, was_queued: false })),
            Err(error) if error.0 == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => Ok(None),
            Err(error) => Err(failed("choosing an algorithm")(error)),
        }
    }

    fn preference(&self) -> Result<Preference, CudaError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref().map_err(failed("describing a product"))?;
        let preference = Preference(preference);
        let set = |attribute, value: &dyn AsBytes| {
            let (from, len) = value.bytes();
            // SAFETY: the preference was just made, and the value is as long as it says.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, from, len) }
                .map_err(failed("describing a product"))
        };
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &self.a.2)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &self.b.2)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &self.d)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &self.d)?;
        Ok(preference)
    }
}

/// A value that cuBLASLt reads by address and length.
trait AsBytes {
    fn bytes(&self) -> (*const c_void, usize);
}

impl AsBytes for u32 {
    fn bytes(&self) -> (*const c_void, usize) {
        (std::ptr::from_ref(self).cast(), size_of::<Self>())
    }
}

impl AsBytes for usize {
    fn bytes(&self) -> (*const c_void, usize) {
        (std::ptr::from_ref(self).cast(), size_of::<Self>())
    }
}

fn transpose(
    operation: &Operation,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    transposed: bool,
) -> Result<(), CudaError> {
    // CUBLAS_OP_N and CUBLAS_OP_T.
    let value = u32::from(transposed);
    let (from, len) = value.bytes();
    // SAFETY: the description exists, and the value is as long as it says.
    unsafe { result::set_matmul_desc_attribute(operation.0, attribute, from, len) }
        .map_err(failed("describing a product"))
}

/// A matrix that is (rows, columns) after it was transposed, if it is.
fn layout(
    scalar: Scalar,
    (rows, columns): (usize, usize),
    transposed: bool,
    leading: usize,
) -> Result<Layout, CudaError> {
    let kind = match scalar {
        Scalar::Float => sys::cudaDataType::CUDA_R_32F,
        Scalar::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    };
    let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
    let leading = i64::try_from(leading).expect("a matrix fits the address space");
    result::create_matrix_layout(kind, rows as u64, columns as u64, leading)
        .map(Layout)
        .map_err(failed("describing a matrix"))
}

impl Blas {
    /// For the current context.
    pub(super) fn new() -> Result<Self, CudaError> {
        let handle = result::create_handle().map_err(failed("starting"))?;
        // Products write the workspace before they read it.
        let workspace = memory(WORKSPACE_BYTES).inspect_err(|_| {
            // SAFETY: the handle was just made, and nothing uses it.
            let _ = unsafe { result::destroy_handle(handle) };
        })?;
        Ok(Self { handle, shared: Mutex::new(Shared { workspace, plans: HashMap::new() }) })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("nothing panics while it holds the lock")
    }

    /// How a product is done, or that cuBLASLt has none of such sizes and addresses.
    fn plan<'a>(&self, shared: &'a mut Shared, product: &Product) -> Result<Option<&'a mut Plan>, CudaError> {
        let key = Key::new(product);
        if !shared.plans.contains_key(&key) {
            let plan = key.plan(self.handle)?;
            if shared.plans.len() == PLANS_MAX {
                // What was queued has its algorithm, and needs the descriptions no more.
                shared.plans.clear();
            }
            shared.plans.insert(key, plan);
        }
        Ok(shared.plans.get_mut(&key).expect("it is there by now").as_mut())
    }

    /// Whether a product of such sizes and addresses was queued before.
    pub(super) fn has_queued(&self, product: &Product) -> bool {
        self.shared()
            .plans
            .get(&Key::new(product))
            .is_some_and(|plan| plan.as_ref().is_some_and(|plan| plan.was_queued))
    }

    /// Whether cuBLASLt has a product of such sizes and addresses.
    pub(super) fn has(&self, product: &Product) -> Result<bool, CudaError> {
        Ok(self.plan(&mut self.shared(), product)?.is_some())
    }

    /// Queues what may hold products of its own while no other product is being queued.
    pub(super) fn alone<T>(&self, queue: impl FnOnce() -> T) -> T {
        let _shared = self.shared();
        queue()
    }

    /// Queues a product, or writes it into the graph that the queue is recorded in.
    pub(super) fn product(&self, product: &Product, stream: cuda_sys::CUstream) -> Result<(), CudaError> {
        let mut shared = self.shared();
        let workspace = shared.workspace;
        let Some(plan) = self.plan(&mut shared, product)? else {
            return Err(CudaError::Blas { operation: "a product", status: format!("none for {product:?}") });
        };
        plan.was_queued = true;
        let (alpha, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        let d = product.d as *mut c_void;
        // SAFETY: the addresses are those of allocations of at least the sizes that the plan was made for, and the plan
        // lives as long as the handle. The workspace is used by one product after the other, in one queue, to which
        // nobody else adds a product while the lock is held.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.a.address as *const c_void,
                plan.a.0,
                product.b.address as *const c_void,
                plan.b.0,
                d.cast_const(),
                plan.d.0,
                d,
                plan.d.0,
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(failed("a product"))
    }

    /// Gives everything back; nothing may be asked of it afterwards.
    pub(super) fn destroy(&self) {
        let mut shared = self.shared();
        shared.plans.clear();
        // SAFETY: both were made by this and are used no more. A failure would leave memory to the process's end.
        unsafe {
            let _ = result::destroy_handle(self.handle);
            let _ = cuda::free_sync(shared.workspace);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::major_of;

    #[test]
    fn old_and_new_numbers_of_versions_are_told_apart() {
        assert_eq!([10_203, 11_502, 120_103, 130_200].map(major_of), [10, 11, 12, 13]);
    }
}
