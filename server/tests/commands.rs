//! The helpers for fleets as people use them: `sanderling-server cert` and `sanderling-server token`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;

use sanderling_common::join::Token;
use sanderling_server::admission::Passes;
use sanderling_transport::{ClientAuthority, ClientIdentity};

/// The exit code, and what was printed to standard output and to standard error.
fn server(folder: &Path, arguments: &str) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling-server"));
    command.args(arguments.split_whitespace()).current_dir(folder).env_remove("SANDERLING_TOKEN");
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn succeeds(folder: &Path, arguments: &str) -> String {
    let (code, out, err) = server(folder, arguments);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{arguments}");
    out
}

fn fails(folder: &Path, arguments: &str, code: i32, words: &str) {
    let (got, out, err) = server(folder, arguments);
    assert_eq!((got, out.as_str()), (Some(code), ""), "{arguments}: {err}");
    assert!(err.contains(words), "{arguments}: {err}");
    // Mistakes on the command line are told with how it is used.
    assert!(code == 2 || err.lines().count() == 1, "{arguments}: {err}");
}

#[cfg(unix)]
fn is_private(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).unwrap().permissions().mode() & 0o777 == 0o600
}

#[cfg(not(unix))]
fn is_private(_path: &Path) -> bool {
    true
}

#[test]
fn an_authority_and_its_clients_are_made_once() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let said = succeeds(folder, "cert ca --out fleet");
    assert!(said.contains("ca.pem") && said.contains("valid for 3650 days"), "{said}");
    let said = succeeds(folder, "cert client --ca fleet --name node-1 --out nodes/one --days 30");
    assert!(said.contains("node-1.pem") && said.contains("valid for 30 days"), "{said}");
    let read = |path: &str| fs::read(folder.join(path)).unwrap();
    ClientAuthority::from_pem(&read("fleet/ca.pem")).unwrap();
    let [certificate, key] = ["nodes/one/node-1.pem", "nodes/one/node-1.key"];
    ClientIdentity::from_pem(&read(certificate), &read(key)).unwrap();
    for path in ["fleet/ca.pem", "fleet/ca.key", certificate, key] {
        assert!(is_private(&folder.join(path)), "{path}");
    }

    // Nothing is overwritten, and nothing is left half done.
    let before = read("fleet/ca.key");
    fails(folder, "cert ca --out fleet", 1, "fleet/ca.key exists already");
    assert_eq!(read("fleet/ca.key"), before);
    fs::remove_file(folder.join("fleet/ca.key")).unwrap();
    fails(folder, "cert ca --out fleet", 1, "fleet/ca.pem exists already");
    assert!(!folder.join("fleet/ca.key").exists(), "a key without its certificate");
    fails(folder, "cert client --ca fleet --name node-2 --out nodes", 1, "ca.key");
    fs::write(folder.join("fleet/ca.key"), before).unwrap();
    fails(folder, "cert client --ca fleet --name node-1 --out nodes/one", 1, "node-1.key exists already");
    fails(folder, "cert client --ca nodes --name node-2 --out nodes", 1, "nodes/ca.pem");
    fails(folder, "cert client --ca fleet --name ../x --out nodes", 2, "such as node-1");
    fails(folder, "cert client --ca fleet --name a --out nodes --days 0", 2, "--days");
    fails(folder, "cert ca --out elsewhere --days 40000", 2, "--days");
}

#[test]
fn tokens_are_printed_once_and_listed_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let path = folder.join("tokens.toml");
    let printed = succeeds(folder, "token add --file tokens.toml --name node-1");
    let token: Token = printed.trim_end().parse().unwrap();
    assert_eq!(token.reveal().len(), 32, "128 bits");
    let passes = Passes::read(&path).unwrap();
    assert_eq!(passes.holder(token.reveal()).unwrap().0.as_str(), "node-1");
    assert!(!fs::read_to_string(&path).unwrap().contains(token.reveal()));
    assert!(is_private(&path));

    let join = format!("sanderling://example.org:4433?pin={}", "ab".repeat(32));
    let printed = succeeds(folder, &format!("token add --file tokens.toml --name node-2 --join {join}"));
    assert!(printed.starts_with(&format!("{join}&token=")), "{printed}");
    succeeds(folder, "cert revoke --file tokens.toml --name node-3");
    assert_eq!(
        succeeds(folder, "token list --file tokens.toml"),
        "node-1\nnode-2\nnode-3 (certificate revoked)\n"
    );

    fails(folder, "token add --file tokens.toml --name node-1", 1, "node-1 has a token already");
    succeeds(folder, "token revoke --file tokens.toml --name node-1");
    assert!(Passes::read(&path).unwrap().holder(token.reveal()).is_none());
    fails(folder, "token revoke --file tokens.toml --name node-1", 1, "no token of node-1");
    fails(folder, "token list --file absent.toml", 1, "token add --file absent.toml");
    fails(folder, "token revoke --file absent.toml --name node-1", 1, "token add --file absent.toml");
    assert!(!folder.join("absent.toml.lock").exists(), "what is not there leaves nothing");
    fails(folder, "token add --file tokens.toml --name node-4 --join nonsense", 2, "join string");
    assert_eq!(succeeds(folder, "token list --file tokens.toml"), "node-2\nnode-3 (certificate revoked)\n");
}

#[test]
fn help_has_examples_and_mistakes_have_sentences() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for command in ["cert ca", "cert client", "cert revoke", "token add", "token revoke"] {
        let help = succeeds(folder, &format!("{command} --help"));
        assert!(help.contains("Example") && help.contains(&format!("sanderling-server {command}")), "{help}");
    }
    for command in ["cert client", "token add"] {
        let help = succeeds(folder, &format!("{command} --help"));
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains("of letters a to z, digits, dots and hyphens"), "{help}");
    }
    // The bare command serves, so that its options and those of the helpers do not mix.
    fails(folder, "--steps 5 cert ca --out fleet", 2, "cert");
    fails(folder, "--tokens-file absent.toml", 1, "token add --file absent.toml");
    fails(folder, "--token 0123456789abcdef --client-ca ca.pem", 2, "client_ca");
    fails(folder, "--memory-max-mb 1", 2, "memory_max_mb = 1");
    fails(folder, "--keep-journal", 2, "keep_journal is about what a state folder keeps");
}
