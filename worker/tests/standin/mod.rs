//! Libraries that stand in for CUDA's driver, run-time compiler and matrix products, for programs that are told to find those
//! first: what calls CUDA runs on machines without a GPU. `cuda.cpp` says how strict they are.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// Set for a program that finds them.
pub(crate) const VARIABLE: &str = "STANDIN_FOLDER";

/// A folder with the libraries, and with what the kernels are compiled with, to where it is compiled.
pub(crate) struct Standin {
    folder: TempDir,
    compiler: String,
}

impl Standin {
    /// Made by that C++ compiler.
    pub(crate) fn new(compiler: String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let here = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../worker"));
        let library = folder.path().join("libcuda.so");
        let made = Command::new(&compiler)
            .args(["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"])
            .arg(here.join("tests/standin/cuda.cpp"))
            .arg("-o")
            .arg(&library)
            .args(["-ldl", "-pthread"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        // One file, so that the loader takes the three for one library.
        for name in ["libnvrtc.so", "libcublasLt.so"] {
            fs::hard_link(&library, folder.path().join(name)).unwrap();
        }
        for name in ["emulate.hpp", "mma.hpp", "hopper.hpp"] {
            let from = here.join("src/kernels/cuda/emulator").join(name);
            fs::copy(from, folder.path().join(name)).unwrap();
        }
        Self { folder, compiler }
    }

    /// A program that finds them.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let folder = self.folder.path();
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", folder).env("XDG_CACHE_HOME", folder).env(VARIABLE, folder);
        command.env("STANDIN_COMPILER", &self.compiler);
        command
    }
}
