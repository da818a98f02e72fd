//! Bytes that many hold and nobody copies.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::mapped::MappedFile;

/// Immutable bytes, in memory or in a mapped file; cloning them copies nothing.
#[derive(Clone)]
pub struct SharedBytes(Storage);

#[derive(Clone)]
enum Storage {
    Memory(Arc<Vec<u8>>),
    Mapped(Arc<MappedFile>),
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Storage::Memory(bytes) => bytes,
            Storage::Mapped(file) => file,
        }
    }
}

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Storage::Memory(Arc::new(bytes)))
    }
}

impl From<&[u8]> for SharedBytes {
    fn from(bytes: &[u8]) -> Self {
        bytes.to_owned().into()
    }
}

impl From<MappedFile> for SharedBytes {
    fn from(file: MappedFile) -> Self {
        Self(Storage::Mapped(Arc::new(file)))
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.0 {
            Storage::Memory(_) => "in memory",
            Storage::Mapped(_) => "mapped",
        };
        write!(f, "{} bytes {place}", self.len())
    }
}
