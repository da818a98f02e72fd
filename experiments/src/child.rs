//! What processes of this program do that another one started.

/// Ends this process when the one that started it is gone, however that ended: it holds the other end of standard input.
pub(crate) fn end_with_the_parent() {
    std::thread::spawn(|| {
        // Nothing is ever said there; an error is as much of an end.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
}
