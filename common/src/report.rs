//! Errors for people.

use std::error::Error;

/// An error and its causes as one sentence, each cause said once: many errors name their cause already.
pub fn one_sentence(error: &(dyn Error + 'static)) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !sentence.contains(&text) {
            sentence = format!("{sentence}: {text}");
        }
        cause = error.source();
    }
    sentence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failure {
        #[error("cannot read a.txt: {0}")]
        Named(#[source] std::io::Error),
        #[error("cannot read a.txt")]
        Unnamed(#[source] std::io::Error),
    }

    #[test]
    fn causes_are_said_once() {
        let cause = || std::io::Error::other("no such file");
        for failure in [Failure::Named(cause()), Failure::Unnamed(cause())] {
            assert_eq!(one_sentence(&failure), "cannot read a.txt: no such file");
        }
    }
}
