//! Libraries that stand in for CUDA's driver, run-time compiler and matrix products, for programs that are told to find those
//! first: what calls CUDA runs on machines without a GPU. `cuda.cpp` says how strict they are.

#![cfg(target_os = "linux")]

use std::env;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::{fs, iter};

use tempfile::TempDir;

/// Variables of the environment that would change what is tested.
const CHANGING: [&str; 4] =
    ["STANDIN_CAPABILITY", "SANDERLING_CUDA_WITHOUT", "EMULATE_SEED", "SANDERLING_SHAPES_SEED"];

/// A folder with the libraries and with what kernels are compiled against, where they are compiled to.
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
            .args(["-std=c++17", "-O1", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden"])
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
        // A compiler may need what was there.
        let before = env::var_os("LD_LIBRARY_PATH");
        let paths = iter::once(folder.to_owned()).chain(before.iter().flat_map(env::split_paths));
        let paths = env::join_paths(paths).unwrap();
        let mut command = Command::new(program);
        for name in CHANGING {
            command.env_remove(name);
        }
        command.env("LD_LIBRARY_PATH", paths).env("XDG_CACHE_HOME", folder).env("STANDIN_FOLDER", folder);
        command.env("STANDIN_COMPILER", &self.compiler);
        command
    }
}
