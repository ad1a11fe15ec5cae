//! How a server's certificate is judged under each `sslmode`.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use x509_cert::der::Decode;
use x509_cert::der::asn1::{PrintableStringRef, Utf8StringRef};

/// Whatever is asked of the certificate, its key must sign the handshake.
#[derive(Debug)]
pub(super) struct Verifier {
    /// None: any certificate will do (`prefer` and `require` without authorities).
    authorities: Option<Authorities>,
    provider: Arc<CryptoProvider>,
}

/// The chain must end at one of the roots; the name is compared if asked.
#[derive(Debug)]
struct Authorities {
    chain: Arc<WebPkiServerVerifier>,
    roots: Vec<CertificateDer<'static>>,
    check_name: bool,
}

impl Verifier {
    pub(super) fn of_anyone(provider: &Arc<CryptoProvider>) -> Self {
        Self { authorities: None, provider: Arc::clone(provider) }
    }

    pub(super) fn of_chains(
        roots: Vec<CertificateDer<'static>>,
        check_name: bool,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let mut store = RootCertStore::empty();
        let (added, _) = store.add_parsable_certificates(roots.iter().cloned());
        if added == 0 {
            return Err("none of the certificates is an X.509 version 3 certificate".to_owned());
        }
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(provider))
            .build()
            .map_err(|e| e.to_string())?;
        Ok(Self { authorities: Some(Authorities { chain, roots, check_name }), provider: Arc::clone(provider) })
    }
}

impl Authorities {
    /// A self-signed certificate that the user himself put into the file of authorities, as the server's
    /// documentation suggests for tests; the library would refuse it for being an authority's.
    fn is_a_root(&self, certificate: &CertificateDer<'_>) -> bool {
        self.roots.iter().any(|root| root.as_ref() == certificate.as_ref())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(authorities) = &self.authorities else { return Ok(ServerCertVerified::assertion()) };
        // The library checks the chain first and the name last: an error about the name means a good chain.
        match authorities.chain.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => {}
            Err(_) if authorities.is_a_root(certificate) => within_its_time(certificate, now)?,
            done => return done,
        }
        if authorities.check_name {
            let parsed = ParsedCertificate::try_from(certificate)?;
            verify_server_name(&parsed, name)
                .or_else(|error| common_name_is(certificate, name).then_some(()).ok_or(error))?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn parsed(certificate: &CertificateDer<'_>) -> Result<x509_cert::Certificate, Error> {
    x509_cert::Certificate::from_der(certificate).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))
}

fn within_its_time(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let validity = parsed(certificate)?.tbs_certificate.validity;
    let now = now.as_secs();
    if now < validity.not_before.to_unix_duration().as_secs() {
        return Err(Error::InvalidCertificate(CertificateError::NotValidYet));
    }
    if now > validity.not_after.to_unix_duration().as_secs() {
        return Err(Error::InvalidCertificate(CertificateError::Expired));
    }
    Ok(())
}

/// As libpq: the subject's common name counts where the certificate has no subjectAltName at all.
fn common_name_is(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    const SUBJECT_ALT_NAME: &str = "2.5.29.17";
    const COMMON_NAME: &str = "2.5.4.3";
    let Ok(parsed) = parsed(certificate) else { return false };
    let body = parsed.tbs_certificate;
    if body.extensions.iter().flatten().any(|extension| extension.extn_id.to_string() == SUBJECT_ALT_NAME) {
        return false;
    }
    let names = body.subject.0.iter().flat_map(|part| part.0.iter());
    names.filter(|part| part.oid.to_string() == COMMON_NAME).any(|part| {
        let value = part.value.decode_as::<Utf8StringRef<'_>>().map(|s| s.as_str().to_owned());
        let value = value.or_else(|_| part.value.decode_as::<PrintableStringRef<'_>>().map(|s| s.as_str().to_owned()));
        value.is_ok_and(|value| matches_host(&value, &name.to_str()))
    })
}

/// `*.example.org` stands for one label.
fn matches_host(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix("*.") {
        Some(domain) => host.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(domain)),
        None => pattern.eq_ignore_ascii_case(host),
    }
}
