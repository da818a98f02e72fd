//! Reading a run file: unknown keys are refused with the nearest known one named.

use super::{ConfigError, RunPartial, SECTIONS};

/// The largest run file read, in bytes.
pub(super) const RUN_FILE_BYTES_MAX: usize = 1 << 20;

/// Parses the text of a run file.
///
/// # Errors
/// A [`ConfigError`] for text that is not TOML, an unknown section or key, or a value of the wrong type.
pub fn parse(text: &str) -> Result<RunPartial, ConfigError> {
    if text.len() > RUN_FILE_BYTES_MAX {
        return Err(ConfigError::FileTooLarge(text.len()));
    }
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| malformed(text, &error))?;
    check_keys(&table)?;
    toml::from_str(text).map_err(|error| malformed(text, &error))
}

/// One line, which names the place: toml's own message is a drawing of several.
fn malformed(text: &str, error: &toml::de::Error) -> ConfigError {
    let what = error.message().trim().lines().collect::<Vec<_>>().join(", ");
    let place = error.span().and_then(|span| text.get(..span.start)).map(|before| {
        let (line, column) =
            (before.matches('\n').count() + 1, before.chars().rev().take_while(|&c| c != '\n').count() + 1);
        format!("line {line}, column {column}: ")
    });
    ConfigError::Malformed(format!("{}{what}", place.unwrap_or_default()))
}

/// Looks at the keys before the types do, because serde's message cannot know the nearest key.
fn check_keys(table: &toml::Table) -> Result<(), ConfigError> {
    for (section, value) in table {
        let Some((_, keys)) = SECTIONS.iter().find(|(name, _)| name == section) else {
            return Err(unknown_section(section));
        };
        for key in value.as_table().into_iter().flat_map(toml::Table::keys) {
            if OF_WORKERS.contains(&key.as_str()) {
                return Err(ConfigError::CommandLineOnly(key.clone()));
            }
            if !keys.contains(&key.as_str()) {
                return Err(unknown_key(section, key));
            }
        }
    }
    Ok(())
}

/// What workers are told on their command lines.
const OF_WORKERS: [&str; 2] = ["device", "precision"];

fn unknown_section(name: &str) -> ConfigError {
    if OF_WORKERS.contains(&name) {
        return ConfigError::CommandLineOnly(name.to_owned());
    }
    match SECTIONS.iter().find(|(_, keys)| keys.contains(&name)) {
        Some((section, _)) => {
            ConfigError::WrongSection { key: name.to_owned(), section: (*section).to_owned() }
        }
        None => ConfigError::UnknownSection {
            name: name.to_owned(),
            nearest: nearest(name, SECTIONS.iter().map(|(section, _)| *section)),
        },
    }
}

fn unknown_key(section: &str, key: &str) -> ConfigError {
    match SECTIONS.iter().find(|(_, keys)| keys.contains(&key)) {
        Some((right, _)) => ConfigError::WrongSection { key: key.to_owned(), section: (*right).to_owned() },
        None => {
            let known = SECTIONS.iter().flat_map(|(name, keys)| keys.iter().map(move |key| (*name, *key)));
            let nearest = known
                .max_by(|a, b| strsim::jaro_winkler(key, a.1).total_cmp(&strsim::jaro_winkler(key, b.1)));
            let (nearest_section, nearest) = nearest.expect("there are settings");
            ConfigError::UnknownKey {
                key: key.to_owned(),
                section: section.to_owned(),
                nearest: nearest.to_owned(),
                nearest_section: nearest_section.to_owned(),
            }
        }
    }
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    known
        .max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
        .expect("there is at least one section")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, parts: &[&str]) {
        let error = parse(text).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }

    #[test]
    fn unknown_names_come_with_the_nearest_known_one() {
        check("[training]\nlearning_rat = 1.0", &["learning_rat", "[training]", "learning_rate"]);
        check("[exchange]\nsecundary = 0.1", &["secundary", "secondary"]);
        check("[modle]\nlayers = 1", &["modle", "[model]"]);
        check("layers = 1", &["layers", "[model]"]);
        check("[training]\nlayers = 1", &["layers", "[model]"]);
    }

    #[test]
    fn wrong_types_and_broken_files_say_where() {
        check("[model]\nlayers = \"two\"", &["line 2, column 10"]);
        check("[model\nlayers = 2", &["line 1"]);
        check("[model]\nlayers = -2", &["line 2, column 10"]);
        check("[run]\nname = 'ü' x", &["line 2, column 12"]);
        for text in
            ["[model]\nlayers = \"two\"", "[model\n", "a = \u{1}", "[training]\nmethod = \"x\"", "= ="]
        {
            let error = parse(text).unwrap_err().to_string();
            assert!(!error.contains('\n') && error.contains("line "), "{error}");
        }
    }
}
