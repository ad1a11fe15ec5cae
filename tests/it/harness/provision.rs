//! Where the servers and client programs of `scripts/provision.sh` are, and a template data directory for each.
//!
//! initdb runs once for each version and set of options; every cluster starts from a copy. PostgreSQL refuses
//! to run as root, so that root's tests run servers as an unprivileged user.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use sha2::{Digest, Sha256};
use tokio::process::Command;

use super::cluster::PASSWORD;

/// The major versions that are provided.
pub const VERSIONS: [u16; 6] = [13, 14, 15, 16, 17, 18];

/// The versions of source and target for tests that work with any: `TEST_POSTGRES="13 18"`, or else 16 and 17.
pub fn versions_under_test() -> (u16, u16) {
    let chosen = std::env::var_os("TEST_POSTGRES").unwrap_or_else(|| "16 17".into());
    let versions: Vec<u16> = chosen.to_string_lossy().split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match versions[..] {
        [source, target] => (source, target),
        [both] => (both, both),
        _ => panic!("TEST_POSTGRES is one version or two, such as \"13 18\", not {chosen:?}"),
    }
}

/// Who runs the servers when the tests run as root.
#[derive(Clone, Copy, Debug)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

impl User {
    /// None where the tests run as an ordinary user, who then runs the servers.
    pub fn unprivileged() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let passwd = fs::read_to_string("/etc/passwd").expect("read /etc/passwd");
        let find = |name: &str| {
            let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
            let fields: Vec<_> = line.split(':').collect();
            Some(Self { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? })
        };
        Some(find("postgres").or_else(|| find("nobody")).expect("neither a user postgres nor nobody"))
    }

    /// Hands a file or an empty folder over to the user who runs the servers.
    pub fn give(path: &Path) {
        if let Some(user) = Self::unprivileged() {
            chown(path, Some(user.uid), Some(user.gid)).expect("chown");
        }
    }
}

/// A command that runs as the user of the servers.
pub fn command(program: impl AsRef<Path>) -> std::process::Command {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(program.as_ref());
    // A folder that every user may stand in.
    command.current_dir("/").stdin(Stdio::null());
    if let Some(user) = User::unprivileged() {
        command.uid(user.uid).gid(user.gid);
    }
    command
}

/// The folder `bin` of a server, with links resolved, since the user of the servers may not pass the checkout.
pub fn server_bin(version: u16) -> PathBuf {
    resolve(&format!("server/{version}/bin"))
}

/// A client program such as `pg_dump` of 16 or 18.
pub fn client_program(version: u16, name: &str) -> PathBuf {
    resolve(&format!("client/{version}/bin")).join(name)
}

fn resolve(item: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".provision").join(item);
    fs::canonicalize(&path).unwrap_or_else(|_| panic!("{} is missing: run scripts/provision.sh", path.display()))
}

/// A new folder for one cluster, short enough for any path limit, which the user of the servers can reach.
pub fn cluster_folder() -> PathBuf {
    let parent = if User::unprivileged().is_some() { PathBuf::from("/tmp") } else { std::env::temp_dir() };
    let folder = tempfile::Builder::new().prefix("pgtandem-cluster-").tempdir_in(parent).expect("a temporary folder");
    User::give(folder.path());
    folder.keep()
}

/// Copies the template of this version and these initdb options to `data`, making the template first if needed.
pub async fn copy_template(version: u16, options: &[String], data: &Path) {
    let template = template(version, options).await;
    let mut copy = command("cp");
    copy.args(["-a", "--reflink=auto"]).arg(template).arg(data);
    run(copy).await;
}

async fn template(version: u16, options: &[String]) -> PathBuf {
    let folder = template_folder();
    let template = folder.join(template_name(version, options));
    if template.exists() {
        return template;
    }
    let lock = template.with_extension("lock");
    let held = tokio::task::spawn_blocking(move || {
        let file = fs::File::create(lock).expect("lock file of a template");
        file.lock().map(|()| file).expect("lock a template")
    })
    .await
    .expect("wait for a template's lock");
    if !template.exists() {
        initialise(version, options, &template).await;
    }
    drop(held);
    template
}

async fn initialise(version: u16, options: &[String], template: &Path) {
    let partial = template.with_extension("partial");
    fs::remove_dir_all(&partial).ok();
    fs::create_dir(&partial).expect("folder of a template");
    User::give(&partial);
    let password = partial.with_extension("password");
    fs::write(&password, PASSWORD).expect("password file");
    User::give(&password);

    let mut initdb = command(server_bin(version).join("initdb"));
    initdb.args(["--username=postgres", "--auth=scram-sha-256", "--no-sync", "--pgdata"]).arg(&partial);
    initdb.arg(format!("--pwfile={}", password.display())).args(options);
    run(initdb).await;

    fs::remove_file(&password).ok();
    fs::rename(&partial, template).expect("put a template into place");
}

/// The name holds the version with its checksum, as the server's own folder does, and the options.
fn template_name(version: u16, options: &[String]) -> String {
    let bin = server_bin(version);
    let server = bin.parent().and_then(Path::file_name).expect("the folder of a server").to_string_lossy();
    let hash = Sha256::digest(options.join("\n"));
    format!("{server}-{:02x}{:02x}{:02x}{:02x}", hash[0], hash[1], hash[2], hash[3])
}

fn template_folder() -> PathBuf {
    let folder = resolve("store").join("template");
    fs::DirBuilder::new().recursive(true).mode(0o755).create(&folder).expect("folder of the templates");
    folder
}

/// Runs a short command to its end, and panics with its output if that is bad.
async fn run(command: std::process::Command) {
    let output = Command::from(command).output().await.expect("start a program");
    assert!(
        output.status.success(),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
