//! A throw-away certificate authority with one server certificate and one client certificate.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::provision::User;

/// The files of a cluster that speaks TLS, all PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate of the authority: `sslrootcert`.
    pub ca: PathBuf,
    /// Made out to `localhost` and `127.0.0.1`.
    pub server_certificate: PathBuf,
    pub server_key: PathBuf,
    /// Made out to the role `postgres`: `sslcert`.
    pub client_certificate: PathBuf,
    /// `sslkey`.
    pub client_key: PathBuf,
}

impl TlsFiles {
    /// Makes the authority and both certificates in `folder`.
    pub fn create(folder: &Path) -> Self {
        fs::create_dir(folder).expect("folder of the certificates");
        User::give(folder);
        let file = |name: &str| folder.join(name);
        let files = Self {
            ca: file("ca.pem"),
            server_certificate: file("server.pem"),
            server_key: file("server.key"),
            client_certificate: file("client.pem"),
            client_key: file("client.key"),
        };
        let authority = authority(folder);
        fs::write(&files.ca, authority.pem()).expect("write the authority");
        issue(&authority, "localhost", &["localhost", "127.0.0.1"], &files.server_certificate, &files.server_key);
        issue(&authority, "postgres", &[], &files.client_certificate, &files.client_key);
        for path in [&files.ca, &files.server_certificate, &files.server_key] {
            User::give(path);
        }
        files
    }

    /// What a client needs that trusts this authority and no other.
    pub fn client_config(&self) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&self.ca).expect("read the authority")).expect("trust the authority");
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("protocol versions")
            .with_root_certificates(roots)
            .with_no_client_auth()
    }
}

/// Each has a name of its own, as authorities have, so that a stranger's certificate is refused for the right reason.
fn authority(folder: &Path) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("throw-away authority of {}", folder.display()));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("authority")
}

fn issue(
    authority: &CertifiedIssuer<'static, KeyPair>,
    common_name: &str,
    names: &[&str],
    certificate: &Path,
    key: &Path,
) {
    use std::os::unix::fs::PermissionsExt;
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(names).expect("names of a certificate");
    params.distinguished_name.push(DnType::CommonName, common_name);
    let pair = KeyPair::generate().expect("key");
    fs::write(certificate, params.signed_by(&pair, authority).expect("sign").pem()).expect("write a certificate");
    fs::write(key, pair.serialize_pem()).expect("write a key");
    fs::set_permissions(key, fs::Permissions::from_mode(0o600)).expect("close a key to others");
}
