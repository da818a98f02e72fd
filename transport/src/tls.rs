//! TLS 1.3 with a self-signed certificate that workers recognise by its SHA-256, so that nobody needs a certificate
//! authority. The signature of the handshake is verified as usual: a pin without it would prove only that the other
//! side has seen the certificate. Workers may have to present a certificate of their own ([`crate::clients`]).

use std::sync::Arc;

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::DigitallySignedStruct;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use sanderling_common::wire::ALPN;
use sha2::{Digest, Sha256};

use crate::clients::{ClientAuthority, ClientIdentity};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No certificate could be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A client certificate that cannot be presented.
    #[error("the client certificate and its key cannot be used: {0}")]
    Identity(#[source] rustls::Error),
    /// rustls refused the configuration.
    #[error("cannot set up TLS: {0}")]
    Rustls(#[from] rustls::Error),
    /// The cryptographic provider lacks the cipher that QUIC needs.
    #[error("cannot set up TLS for QUIC: {0}")]
    Cipher(#[from] NoInitialCipherSuite),
}

/// A self-signed certificate with its key.
pub struct Certificate {
    der: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Certificate {
    /// Makes a fresh one (ECDSA P-256).
    ///
    /// # Errors
    /// [`TlsError::Certificate`].
    pub fn generate() -> Result<Self, TlsError> {
        let made = rcgen::generate_simple_self_signed(["sanderling".to_owned()])?;
        Ok(Self {
            der: made.cert.der().clone(),
            key: PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()),
        })
    }

    /// One that was made before, of its DER form and that of its key (PKCS #8).
    pub fn from_der(certificate: Vec<u8>, key: Vec<u8>) -> Self {
        Self { der: CertificateDer::from(certificate), key: PrivatePkcs8KeyDer::from(key) }
    }

    /// Its DER form and that of its key, to be kept secret.
    pub fn to_der(&self) -> (Vec<u8>, Vec<u8>) {
        (self.der.to_vec(), self.key.secret_pkcs8_der().to_vec())
    }

    /// 32 bytes that only whoever has the key can make, for one purpose: the same whenever the certificate is used.
    pub(crate) fn derived(&self, purpose: &str) -> [u8; 32] {
        let secret = Sha256::new().chain_update(self.key.secret_pkcs8_der());
        Sha256::new().chain_update(secret.finalize()).chain_update(purpose).finalize().into()
    }

    /// The SHA-256 by which workers recognise it.
    pub fn pin(&self) -> [u8; 32] {
        Sha256::digest(&self.der).into()
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Bytes from the system's secure generator, for tokens and session names.
///
/// # Panics
/// If the system has no randomness to give, when nothing secret can be made.
pub fn secure_random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    provider().secure_random.fill(&mut bytes).expect("the system's random generator works");
    bytes
}

/// The server's side of TLS. With an authority, only clients with a certificate that it signed get through the handshake.
///
/// # Errors
/// A [`TlsError`].
pub fn server_tls(
    certificate: &Certificate,
    clients: Option<&ClientAuthority>,
) -> Result<QuicServerConfig, TlsError> {
    let key = PrivateKeyDer::Pkcs8(certificate.key.clone_key());
    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match clients {
        Some(clients) => builder.with_client_cert_verifier(clients.0.clone()),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(vec![certificate.der.clone()], key)?;
    // Every connection is a full handshake: a session that is resumed would not verify the client again, and workers
    // keep none.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(QuicServerConfig::try_from(config)?)
}

/// The worker's side of TLS: trusts the certificate with this pin and no other, and presents its own where it has one and
/// the server asks for it.
///
/// # Errors
/// A [`TlsError`], also for an identity whose certificate and key do not belong together.
pub fn client_tls(pin: [u8; 32], identity: Option<&ClientIdentity>) -> Result<QuicClientConfig, TlsError> {
    let provider = provider();
    let verifier = PinVerifier { pin, provider: provider.clone() };
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some(identity) => builder
            .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
            .map_err(TlsError::Identity)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(QuicClientConfig::try_from(config)?)
}

/// Accepts exactly one certificate.
#[derive(Debug)]
struct PinVerifier {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if <[u8; 32]>::from(Sha256::digest(end_entity)) == self.pin {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General(
            "the server's certificate is not the one of the join string (is this the string it printed last?)".into(),
        ))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("QUIC runs over TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
