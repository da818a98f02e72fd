//! The driver's own code, which the emulator does not reach, over libraries that stand in for CUDA's: the tests of a GPU, in a
//! process whose loader finds those.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::skip;

/// Set in that process.
const STANDIN_VARIABLE: &str = "STANDIN_FOLDER";

/// Whether the GPU is one that is stood in for, which takes its time.
pub(crate) fn is_standin() -> bool {
    std::env::var_os(STANDIN_VARIABLE).is_some()
}

/// Makes the libraries, one file under their three names, and puts beside them what kernels are compiled with.
fn build(folder: &Path, compiler: &str) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = folder.join("libcuda.so");
    let made = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"])
        .arg(sources.join("tests/cuda/standin.cpp"))
        .arg("-o")
        .arg(&library)
        .args(["-ldl", "-pthread"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // Links, so that the loader takes them for one library.
    for name in ["libnvrtc.so", "libcublasLt.so"] {
        fs::hard_link(&library, folder.join(name)).unwrap();
    }
    for name in ["emulate.hpp", "mma.hpp", "hopper.hpp"] {
        fs::copy(sources.join("src/kernels/cuda/emulator").join(name), folder.join(name)).unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_driver_keeps_cudas_rules() {
    let Some(compiler) = skip::compiler() else { return };
    let folder = tempfile::tempdir().unwrap();
    build(folder.path(), &compiler);
    let names = [
        "graphs::gpu::steps_by_graphs_are_steps_one_by_one::bf16",
        "graphs::gpu::many_shapes::f32",
        "graphs::gpu_shared::threads_come_to_the_same::bf16",
        "shared::gpu::threads_get_the_same_products::f32",
        "shared::gpu::threads_get_the_same_products::bf16",
        "shared::gpu::memory_is_given_back_in_time::f32",
        "fixtures::gpu::mixtral::bf16",
    ];
    let run = Command::new(std::env::current_exe().unwrap())
        .args(names)
        .args(["--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("XDG_CACHE_HOME", folder.path())
        .env(STANDIN_VARIABLE, folder.path())
        .env("STANDIN_COMPILER", &compiler)
        .env("SANDERLING_TESTS_REQUIRE", "gpu")
        .output()
        .unwrap();
    let (said, errors) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{said}\n{errors}");
    assert!(said.contains(&format!("test result: ok. {} passed", names.len())), "{said}");
}
