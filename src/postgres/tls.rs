//! TLS as libpq's `sslmode`, `sslrootcert`, `sslcert`, `sslkey` and `channel_binding` ask for it.
//! See <https://www.postgresql.org/docs/current/libpq-ssl.html>.
//!
//! As with libpq, a file of authorities (`sslrootcert`, else `~/.postgresql/root.crt`) is used in every mode in
//! which it is there, and `prefer` and `require` verify nothing without one. Friendlier than libpq: `verify-ca` and
//! `verify-full` without any file use the authorities of the system, and a file that was named must be readable.
//! Whatever the mode, the server must prove that it holds the key of its certificate: channel binding rests on that.

mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_cert::der::{Decode, Encode};

use crate::error::{Class, Error, Result};
use crate::postgres::ConnInfo;
use crate::postgres::conninfo::{Root, SslMode, SslNegotiation, TlsVersion};

/// The TLS side of a connection string, with its files read.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    authorities: Authorities,
}

/// Where the authorities that may vouch for the server come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authorities {
    /// Nobody is asked: encrypted, but to whom is not known.
    Unchecked,
    /// A file.
    File(PathBuf),
    /// The operating system's.
    System,
}

impl Tls {
    /// Reads the files that `conninfo` names; `None` under `sslmode=disable` or without a TCP host.
    ///
    /// # Errors
    /// Class usage: a file that cannot be read or holds something else than PEM.
    pub fn new(conninfo: &ConnInfo) -> Result<Option<Self>> {
        let ssl = conninfo.ssl();
        if ssl.mode == SslMode::Disable || conninfo.hosts().iter().all(super::conninfo::Host::is_unix) {
            return Ok(None);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions: Vec<_> =
            [(TlsVersion::Tls12, &rustls::version::TLS12), (TlsVersion::Tls13, &rustls::version::TLS13)]
                .into_iter()
                .filter(|(version, _)| (ssl.min_version..=ssl.max_version).contains(version))
                .map(|(_, version)| version)
                .collect();
        let authorities = authorities(conninfo);
        let verifier = verifier(&authorities, ssl.mode, &provider)?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|e| usage("tls_versions", format!("no usable TLS version: {e}")))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match client_certificate(conninfo)? {
            None => builder.with_no_client_auth(),
            Some((chain, key, file)) => builder.with_client_auth_cert(chain, key).map_err(|e| {
                usage(
                    "tls_client_certificate",
                    format!("the client certificate {} cannot be used: {e}", file.display()),
                )
                .hint("the key must be the one of the certificate")
            })?,
        };
        config.enable_sni = ssl.sni;
        if ssl.negotiation == SslNegotiation::Direct {
            config.alpn_protocols = vec![b"postgresql".to_vec()];
        }
        Ok(Some(Self { config: Arc::new(config), authorities }))
    }

    /// For tokio-rustls.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    /// Who vouches for the server.
    #[must_use]
    pub fn authorities(&self) -> &Authorities {
        &self.authorities
    }
}

/// The name that the server's certificate must carry, and that SNI sends.
///
/// # Errors
/// Class usage: a host that is neither a DNS name nor an address.
pub fn server_name(host: &str) -> Result<ServerName<'static>> {
    // A name's final dot is for DNS only.
    let name = host.strip_suffix('.').unwrap_or(host);
    ServerName::try_from(name.to_owned())
        .map_err(|_| usage("tls_host_name", format!("{host:?} is not a host name that a certificate could carry")))
}

fn usage(code: &'static str, message: String) -> Error {
    Error::new(Class::Usage, code, message)
}

fn authorities(conninfo: &ConnInfo) -> Authorities {
    match &conninfo.ssl().root {
        Root::System => Authorities::System,
        Root::File(file) => Authorities::File(file.clone()),
        Root::Default => match in_home(conninfo, "root.crt") {
            Some(file) => Authorities::File(file),
            None if conninfo.ssl().mode >= SslMode::VerifyCa => Authorities::System,
            None => Authorities::Unchecked,
        },
    }
}

/// `~/.postgresql/<name>`, if it is there.
fn in_home(conninfo: &ConnInfo, name: &str) -> Option<PathBuf> {
    conninfo.home().map(|home| home.join(".postgresql").join(name)).filter(|file| file.exists())
}

fn verifier(
    authorities: &Authorities,
    mode: SslMode,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::client::danger::ServerCertVerifier>> {
    let roots = match authorities {
        Authorities::Unchecked => return Ok(Arc::new(verify::Verifier::of_anyone(provider))),
        Authorities::File(file) => read_certificates(file, "sslrootcert")?,
        Authorities::System => system_certificates()?,
    };
    let check_name = mode == SslMode::VerifyFull;
    let verifier = verify::Verifier::of_chains(roots, check_name, provider)
        .map_err(|e| usage("tls_root_certificate", format!("the authorities of sslrootcert cannot be used: {e}")))?;
    Ok(Arc::new(verifier))
}

fn system_certificates() -> Result<Vec<CertificateDer<'static>>> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        return Err(usage("tls_no_system_authorities", "this system trusts no certificate authority".into())
            .hint("install the package ca-certificates, or name a file of authorities with sslrootcert"));
    }
    Ok(found.certs)
}

fn read_certificates(file: &Path, keyword: &str) -> Result<Vec<CertificateDer<'static>>> {
    let text = read(file, keyword)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| usage("tls_certificate_file", format!("{keyword} {}: not PEM: {e}", file.display())))?;
    if certificates.is_empty() {
        return Err(usage("tls_certificate_file", format!("{keyword} {}: no certificate in it", file.display()))
            .hint("it must be PEM: -----BEGIN CERTIFICATE----- …"));
    }
    Ok(certificates)
}

fn read(file: &Path, keyword: &str) -> Result<Vec<u8>> {
    fs::read(file).map_err(|e| {
        usage("tls_file_unreadable", format!("{keyword} {}: {e}", file.display()))
            .hint(format!("check the path in {keyword} of the connection string"))
            .because(e)
    })
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, PathBuf);

/// `sslcert` and `sslkey`, else `~/.postgresql/postgresql.crt` and `.key` if the certificate is there.
fn client_certificate(conninfo: &ConnInfo) -> Result<Option<ClientCertificate>> {
    let ssl = conninfo.ssl();
    if ssl.no_certificate {
        return Ok(None);
    }
    let Some(file) = ssl.certificate.clone().or_else(|| in_home(conninfo, "postgresql.crt")) else {
        return Ok(None);
    };
    let Some(key_file) = ssl.key.clone().or_else(|| in_home(conninfo, "postgresql.key")) else {
        return Err(usage("tls_client_key", format!("there is no key for the client certificate {}", file.display()))
            .hint("name it with sslkey"));
    };
    let chain = read_certificates(&file, "sslcert")?;
    let text = read(&key_file, "sslkey")?;
    refuse_shared_key(&key_file)?;
    if text.windows(9).any(|window| window == b"ENCRYPTED") {
        return Err(usage(
            "tls_client_key",
            format!("sslkey {}: keys with a passphrase are not supported", key_file.display()),
        )
        .hint("openssl pkey -in KEY -out PLAIN_KEY writes one without; chmod 0600 it"));
    }
    let key = PrivateKeyDer::from_pem_slice(&text)
        .map_err(|e| usage("tls_client_key", format!("sslkey {}: no usable key: {e}", key_file.display())))?;
    Ok(Some((chain, key, file)))
}

/// As libpq: 0600 or less, or 0640 or less where root owns the file.
fn refuse_shared_key(file: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let meta =
        fs::metadata(file).map_err(|e| usage("tls_file_unreadable", format!("sslkey {}: {e}", file.display())))?;
    let forbidden = if meta.uid() == 0 { 0o037 } else { 0o077 };
    if meta.mode() & forbidden == 0 {
        return Ok(());
    }
    let message = format!("sslkey {}: others can read it (mode {:04o})", file.display(), meta.mode() & 0o7777);
    Err(usage("tls_client_key_shared", message).hint(format!("chmod 0600 {}", file.display())))
}

/// The channel binding `tls-server-end-point` of a server's certificate: its digest under the hash of its own
/// signature, MD5 and SHA-1 raised to SHA-256 (RFC 5929, section 4.1). `None` for a signature without such a hash.
#[must_use]
pub fn tls_server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let parsed = x509_cert::Certificate::from_der(certificate).ok()?;
    let algorithm = parsed.signature_algorithm;
    let oid = match algorithm.oid.to_string().as_str() {
        // RSASSA-PSS says its hash in its parameters: RSASSA-PSS-params.hashAlgorithm, SHA-1 if left out.
        "1.2.840.113549.1.1.10" => pss_hash(&algorithm.parameters?.to_der().ok()?)?,
        other => other.to_owned(),
    };
    match oid.as_str() {
        // md5 and sha1 with RSA, ecdsa-with-SHA1, sha256 with RSA, ecdsa-with-SHA256, SHA-1 and SHA-256 themselves.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.10045.4.1"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2"
        | "1.3.14.3.2.26"
        | "2.16.840.1.101.3.4.2.1" => Some(Sha256::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" | "2.16.840.1.101.3.4.2.2" => {
            Some(Sha384::digest(certificate).to_vec())
        }
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" | "2.16.840.1.101.3.4.2.3" => {
            Some(Sha512::digest(certificate).to_vec())
        }
        _ => None,
    }
}

/// The object identifier of the hash in the DER of RSASSA-PSS parameters.
fn pss_hash(parameters: &[u8]) -> Option<String> {
    use x509_cert::der::asn1::{ContextSpecific, ObjectIdentifier};
    use x509_cert::der::{AnyRef, Reader, SliceReader, TagNumber};
    let any = AnyRef::from_der(parameters).ok()?;
    let mut reader = SliceReader::new(any.value()).ok()?;
    let hash = ContextSpecific::<AnyRef<'_>>::decode_explicit(&mut reader, TagNumber::N0).ok()?;
    let Some(hash) = hash else { return Some("1.3.14.3.2.26".to_owned()) };
    let mut inner = SliceReader::new(hash.value.value()).ok()?;
    inner.decode::<ObjectIdentifier>().ok().map(|oid| oid.to_string())
}

/// What a failed handshake means, for a person.
#[must_use]
pub fn explain(error: std::io::Error, host: &str, authorities: Option<&Authorities>) -> Error {
    use rustls::{AlertDescription, CertificateError, Error as Tls};
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>()) else {
        let message = format!("the TLS handshake broke off: {error}");
        return Error::new(Class::Retry, "tls_handshake", message)
            .hint("the server's log says why it hung up; a proxy between may not speak TLS")
            .because(error);
    };
    let (code, what, hint): (_, String, String) = match tls {
        Tls::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => (
            "tls_certificate_expired",
            "the server's certificate has expired".into(),
            "renew the certificate on the server, and check this machine's clock".into(),
        ),
        Tls::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => (
            "tls_certificate_not_yet_valid",
            "the server's certificate is not valid yet".into(),
            "check the clocks of this machine and of the server".into(),
        ),
        // A self-signed certificate that is not among the authorities is reported as one used in the wrong place.
        Tls::InvalidCertificate(reason)
            if *reason == CertificateError::UnknownIssuer || reason.to_string().contains("CaUsedAsEndEntity") =>
        {
            (
                "tls_unknown_authority",
                format!(
                    "the server's certificate comes from an authority that is not trusted ({})",
                    trusted(authorities)
                ),
                "name the file of the server's authority with sslrootcert; managed services offer it for download"
                    .into(),
            )
        }
        Tls::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => (
            "tls_name_mismatch",
            format!("the server's certificate is not for {host:?}"),
            "connect by a name that the certificate carries (hostaddr can fix the address), or use sslmode=verify-ca"
                .into(),
        ),
        Tls::InvalidCertificate(other) => (
            "tls_certificate_invalid",
            format!("the server's certificate cannot be verified: {other}"),
            "check the server's ssl_cert_file; X.509 version 3 with subjectAltName is needed".into(),
        ),
        Tls::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => (
                "tls_client_certificate_required",
                "the server asks for a client certificate".into(),
                "give one with sslcert and sslkey".into(),
            ),
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::DecryptError => (
                "tls_client_certificate_refused",
                format!("the server refuses our client certificate ({alert:?})"),
                "check sslcert, and the server's ssl_ca_file".into(),
            ),
            other => (
                "tls_handshake",
                format!("the server refuses the TLS handshake ({other:?})"),
                "check ssl_min_protocol_version and ssl_ciphers of the server".into(),
            ),
        },
        other => (
            "tls_handshake",
            format!("the TLS handshake failed: {other}"),
            "check that the port is PostgreSQL's and that the server speaks TLS 1.2 or later".into(),
        ),
    };
    Error::new(Class::Wait, code, what).hint(hint).because(error)
}

fn trusted(authorities: Option<&Authorities>) -> String {
    match authorities {
        Some(Authorities::File(file)) => format!("trusted are those of {}", file.display()),
        Some(Authorities::System) => "trusted are those of this system".to_owned(),
        Some(Authorities::Unchecked) | None => "nobody is trusted".to_owned(),
    }
}
