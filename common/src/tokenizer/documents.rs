//! Documents in files: a text is one document, a JSONL file has one a line.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::pieces::{PIECE_BYTES, PieceError, PieceReader, piece_len};

/// The longest line of a JSONL file, in bytes.
pub const DOCUMENT_BYTES_MAX: u64 = 1 << 28;

/// Why documents cannot be read; every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The system refuses.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not a text.
    #[error("cannot read {path}: {source}")]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: PieceError,
    },
    /// Neither a text nor JSONL by its name.
    #[error("{0} ends in neither .txt nor .jsonl, so that it is not clear how to read it")]
    UnknownKind(PathBuf),
    /// A line longer than any.
    #[error("{path}, line {line}: it has more than {DOCUMENT_BYTES_MAX} bytes")]
    LineTooLong {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
    },
    /// A line that is not JSON.
    #[error("{path}, line {line}: it is not JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// Why not.
        source: serde_json::Error,
    },
    /// A line without the text.
    #[error("{path}, line {line}: it has no text in a field {field:?}")]
    NoText {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The field.
        field: String,
    },
}

/// A document, or a piece of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Of at most [`PIECE_BYTES`].
    pub text: String,
    /// Whether a document begins with it.
    pub begins: bool,
    /// Bytes of the file that were read for it.
    pub read_bytes: u64,
}

/// The documents of a file, in segments.
pub struct Documents {
    path: PathBuf,
    source: Source,
}

enum Source {
    Text { pieces: PieceReader<File>, begun: bool },
    Jsonl(Lines),
}

impl Documents {
    /// Opens a `.txt` or `.jsonl` file; of the lines of the latter, `field` is the text.
    ///
    /// # Errors
    /// [`DocumentError::UnknownKind`] or [`DocumentError::Unreadable`].
    pub fn open(path: &Path, field: &str) -> Result<Self, DocumentError> {
        let extension = path.extension().map(|extension| extension.to_ascii_lowercase());
        let lines = match extension.as_ref().and_then(|extension| extension.to_str()) {
            Some("txt") => false,
            Some("jsonl") => true,
            _ => return Err(DocumentError::UnknownKind(path.to_owned())),
        };
        let file =
            File::open(path).map_err(|source| DocumentError::Unreadable { path: path.to_owned(), source })?;
        let source = if lines {
            Source::Jsonl(Lines {
                input: BufReader::new(file),
                field: field.to_owned(),
                line: 0,
                document: String::new(),
                begun: false,
                read_bytes: 0,
            })
        } else {
            Source::Text { pieces: PieceReader::new(file, PIECE_BYTES), begun: false }
        };
        Ok(Self { path: path.to_owned(), source })
    }
}

impl Iterator for Documents {
    type Item = Result<Segment, DocumentError>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.source {
            Source::Text { pieces, begun } => {
                let piece = pieces.next()?.map(|text| {
                    let read_bytes = text.len() as u64;
                    Segment { text, begins: !std::mem::replace(begun, true), read_bytes }
                });
                Some(piece.map_err(|source| DocumentError::Text { path: self.path.clone(), source }))
            }
            Source::Jsonl(lines) => lines.segment(&self.path).transpose(),
        }
    }
}

struct Lines {
    input: BufReader<File>,
    field: String,
    /// The number of the last line read.
    line: u64,
    /// What is left of the document of that line.
    document: String,
    /// Whether a piece of it was given out.
    begun: bool,
    /// Bytes read since the last segment.
    read_bytes: u64,
}

impl Lines {
    fn segment(&mut self, path: &Path) -> Result<Option<Segment>, DocumentError> {
        while self.document.is_empty() {
            let Some(line) = self.read_line(path)? else { return Ok(None) };
            // An empty line, such as the last, is no document, and neither is one whose text is empty.
            if !line.trim_ascii().is_empty() {
                self.document = self.text(path, &line)?;
                self.begun = false;
            }
        }
        let rest = self.document.split_off(piece_len(&self.document, PIECE_BYTES));
        Ok(Some(Segment {
            text: std::mem::replace(&mut self.document, rest),
            begins: !std::mem::replace(&mut self.begun, true),
            read_bytes: std::mem::take(&mut self.read_bytes),
        }))
    }

    fn read_line(&mut self, path: &Path) -> Result<Option<Vec<u8>>, DocumentError> {
        let mut line = Vec::new();
        let read = self.input.by_ref().take(DOCUMENT_BYTES_MAX + 1).read_until(b'\n', &mut line);
        let read = read.map_err(|source| DocumentError::Unreadable { path: path.to_owned(), source })?;
        self.read_bytes += read as u64;
        self.line += 1;
        if read as u64 > DOCUMENT_BYTES_MAX {
            return Err(DocumentError::LineTooLong { path: path.to_owned(), line: self.line });
        }
        Ok((read > 0).then_some(line))
    }

    fn text(&self, path: &Path, line: &[u8]) -> Result<String, DocumentError> {
        let (path, at) = (path.to_owned(), self.line);
        let value: serde_json::Value = match serde_json::from_slice(line) {
            Ok(value) => value,
            Err(source) => return Err(DocumentError::Json { path, line: at, source }),
        };
        match value {
            serde_json::Value::Object(mut fields) => match fields.remove(&self.field) {
                Some(serde_json::Value::String(text)) => Ok(text),
                _ => Err(DocumentError::NoText { path, line: at, field: self.field.clone() }),
            },
            _ => Err(DocumentError::NoText { path, line: at, field: self.field.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: &[u8]) -> Result<Vec<Segment>, DocumentError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Documents::open(&path, "text")?.collect()
    }

    #[test]
    fn a_text_is_one_document_and_a_line_is_one() {
        let long = "word ".repeat(PIECE_BYTES / 4);
        let text = read("a.txt", long.as_bytes()).unwrap();
        assert_eq!(text.iter().map(|segment| segment.begins).collect::<Vec<_>>(), [true, false]);
        assert_eq!(text.iter().map(|segment| segment.read_bytes).sum::<u64>(), long.len() as u64);

        let line = serde_json::json!({ "id": 7, "text": long });
        let file = format!("{{\"text\": \"a\\nb\"}}\n\n{{\"text\": \"\"}}\r\n{line}");
        let lines = read("a.JSONL", file.as_bytes()).unwrap();
        assert_eq!(lines.iter().map(|segment| segment.begins).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(lines[0].text, "a\nb");
        assert_eq!(lines[1].text.clone() + &lines[2].text, long);
        assert_eq!((&lines[1].text, &lines[2].text), (&text[0].text, &text[1].text));
        assert_eq!(lines.iter().map(|segment| segment.read_bytes).sum::<u64>(), file.len() as u64);
        assert!(read("a.txt", b"").unwrap().is_empty() && read("a.jsonl", b"\n").unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (name, bytes, words) in [
            ("a.txt", &b"ab\xff"[..], "byte 2"),
            ("a.csv", b"", "neither .txt nor .jsonl"),
            ("a.jsonl", b"{\"text\": \"a\"}\n{\"text\"", "line 2: it is not JSON"),
            ("a.jsonl", b"{\"text\": \"\xff\"}", "line 1: it is not JSON"),
            ("a.jsonl", b"{\"text\": 3}", "line 1: it has no text in a field \"text\""),
            ("a.jsonl", b"\n{\"txt\": \"a\"}", "line 2: it has no text"),
            ("a.jsonl", b"[\"text\"]", "line 1: it has no text"),
        ] {
            let error = read(name, bytes).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(name), "{error}");
        }
        let error = Documents::open(Path::new("absent.txt"), "text").err().unwrap().to_string();
        assert!(error.contains("absent.txt"), "{error}");
    }
}
