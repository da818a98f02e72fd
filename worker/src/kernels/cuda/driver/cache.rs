//! Compiled kernels on disk, so that they are compiled once per machine.

use std::fs;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

/// Bytes of the hash that a file begins with.
const HASH_BYTES: usize = 32;

/// Where a compiled unit is kept: named by everything that it was made of.
pub(super) struct Entry {
    name: String,
    file: Option<PathBuf>,
}

impl Entry {
    /// The place of what `text` compiles to with these options and this compiler.
    pub(super) fn new(text: &str, options: &[String], (major, minor): (i32, i32)) -> Self {
        let mut hash = Sha256::new();
        hash.update(format!("nvrtc {major}.{minor}\n"));
        options.iter().for_each(|option| hash.update(format!("{option}\n")));
        hash.update(text);
        let name = hex(&hash.finalize());
        let file = directory().map(|directory| directory.join(format!("{name}.cubin")));
        Self { name, file }
    }

    /// What tells this unit from all others.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What is kept there, if it is whole.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        let bytes = fs::read(self.file.as_ref()?).ok()?;
        let (hash, code) = bytes.split_at_checked(HASH_BYTES)?;
        (Sha256::digest(code).as_slice() == hash).then(|| code.to_vec())
    }

    /// Keeps code. A folder that cannot be written costs the next start the time of compiling, and nothing else.
    pub(super) fn write(&self, code: &[u8]) {
        let Some(file) = &self.file else { return };
        let written = (|| {
            let directory = file.parent().ok_or_else(|| std::io::Error::other("no folder"))?;
            fs::create_dir_all(directory)?;
            // Several processes may start at once: each writes a file of its own, and the last name wins. Within one it is the same
            // bytes that meet.
            let own = file.with_extension(format!("{}", std::process::id()));
            let mut bytes = Sha256::digest(code).to_vec();
            bytes.extend_from_slice(code);
            fs::write(&own, bytes)?;
            fs::rename(&own, file)
        })();
        if let Err(error) = written {
            tracing::debug!("compiled kernels are not kept in {}: {error}", file.display());
        }
    }
}

/// The user's folder for what can be made again.
fn directory() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("sanderling").join("kernels"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
