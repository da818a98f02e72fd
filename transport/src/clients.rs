//! Client certificates: a small certificate authority of one's own that signs them, what a server checks them with, and
//! what a worker presents.
//!
//! A client is known by the DNS names of its certificate. The server's own certificate stays pinned by the join string;
//! the authority says nothing about servers.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quinn::Connection;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use webpki::EndEntityCert;

use crate::tls::provider;

/// The name of every authority made here. Its certificate is told from another's by its key.
const AUTHORITY_NAME: &str = "Sanderling fleet";

/// Certificates are valid from this long before they are made, for the sake of clocks that are slow.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);

/// Certificates of an authority that one file may hold, so that a server reads no more of another file.
const AUTHORITIES_MAX: usize = 64;

/// Why a certificate or a key cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It cannot be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The text is not PEM, or holds something else.
    #[error("there is no {what} in it that can be read ({source})")]
    Pem {
        /// What was looked for.
        what: &'static str,
        /// What was found instead.
        source: pem::Error,
    },
    /// A certificate that is not one of an authority.
    #[error("its certificate is none that can sign others: {0}")]
    Authority(#[source] rustls::Error),
    /// More certificates than an authority has.
    #[error("it holds more than {AUTHORITIES_MAX} certificates")]
    TooMany,
    /// rustls makes no verifier of it.
    #[error("it cannot be used: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// A certificate that cannot sign where one is needed that can.
    #[error(
        "its certificate is a client's, or a server's, and none that can sign others; give the authority's own, ca.pem"
    )]
    NotAuthority,
    /// An authority's certificate where a client's is needed.
    #[error(
        "its certificate is an authority's, which signs those of clients; make one for the worker with `sanderling-server \
         cert client`"
    )]
    NotClient,
    /// The authority's key does not go with its certificate.
    #[error("the key is not that of the certificate, or the certificate is none of `cert ca`'s: {0}")]
    OtherKey(#[source] rustls::Error),
}

/// A certificate and its key as PEM texts.
pub struct PemPair {
    /// For everybody.
    pub certificate: String,
    /// For its owner only.
    pub key: String,
}

impl fmt::Debug for PemPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PemPair").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// A certificate authority with its key, which can sign.
pub struct Authority {
    certificate: String,
    key: KeyPair,
}

impl Authority {
    /// A fresh one (ECDSA P-256), valid for that many days from now.
    ///
    /// # Errors
    /// [`ClientError::Make`].
    pub fn generate(days: u32) -> Result<Self, ClientError> {
        let key = KeyPair::generate()?;
        let certificate = authority_params(days)?.self_signed(&key)?.pem();
        Ok(Self { certificate, key })
    }

    /// One that was made before.
    ///
    /// # Errors
    /// A [`ClientError`] for texts that hold none. Whether the two belong together shows when it signs.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, ClientError> {
        certificates(certificate.as_bytes())?;
        Ok(Self { certificate: certificate.to_owned(), key: KeyPair::from_pem(key)? })
    }

    /// Its texts.
    pub fn to_pem(&self) -> PemPair {
        PemPair { certificate: self.certificate.clone(), key: self.key.serialize_pem() }
    }

    /// A fresh client certificate with this DNS name, valid for that many days from now.
    ///
    /// # Errors
    /// [`ClientError::Make`], or [`ClientError::OtherKey`] if a server would not take what this authority signs.
    pub fn sign(&self, name: &str, days: u32) -> Result<PemPair, ClientError> {
        let mut params = params(days, [name.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let issuer_params = authority_params(days)?;
        let issuer = Issuer::from_params(&issuer_params, &self.key);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        let authority = ClientAuthority::from_pem(self.certificate.as_bytes())?;
        let checked = authority.0.verify_client_cert(certificate.der(), &[], UnixTime::now());
        checked.map_err(ClientError::OtherKey)?;
        Ok(PemPair { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

fn authority_params(days: u32) -> Result<CertificateParams, ClientError> {
    let mut params = params(days, [])?;
    params.distinguished_name.push(DnType::CommonName, AUTHORITY_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn params<const N: usize>(days: u32, names: [String; N]) -> Result<CertificateParams, ClientError> {
    let mut params = CertificateParams::new(names)?;
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SLACK).into();
    params.not_after = (now + Duration::from_secs(86_400 * u64::from(days))).into();
    params.distinguished_name = DistinguishedName::new();
    Ok(params)
}

/// What a server checks the certificates of workers with.
#[derive(Clone, Debug)]
pub struct ClientAuthority(pub(crate) Arc<dyn ClientCertVerifier>);

impl ClientAuthority {
    /// The certificates of one or several authorities, PEM.
    ///
    /// # Errors
    /// A [`ClientError`] for a text without a certificate, or with one that cannot sign.
    pub fn from_pem(pem: &[u8]) -> Result<Self, ClientError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem)? {
            if is_authority(&certificate) == Some(false) {
                return Err(ClientError::NotAuthority);
            }
            roots.add(certificate).map_err(ClientError::Authority)?;
        }
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        Ok(Self(builder.build()?))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    let read = |source| ClientError::Pem { what: "certificate", source };
    let all = CertificateDer::pem_slice_iter(pem).take(AUTHORITIES_MAX + 1);
    let all = all.collect::<Result<Vec<_>, _>>().map_err(read)?;
    match all.len() {
        0 => Err(read(pem::Error::NoItemsFound)),
        1..=AUTHORITIES_MAX => Ok(all),
        _ => Err(ClientError::TooMany),
    }
}

/// Whether a certificate can sign others; `None` if it cannot be read.
fn is_authority(certificate: &CertificateDer<'_>) -> Option<bool> {
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    // One that can sign is refused for that in the place of a client's, at a time at which it is valid.
    let refused_at = |time| {
        let usage = webpki::KeyUsage::client_auth();
        parsed.verify_for_usage(&[], &[], &[], time, usage, None, None).err()
    };
    let refusal = match refused_at(UnixTime::now()) {
        Some(webpki::Error::CertExpired { not_after, .. }) => refused_at(not_after),
        Some(webpki::Error::CertNotValidYet { not_before, .. }) => refused_at(not_before),
        refusal => refusal,
    };
    Some(refusal == Some(webpki::Error::CaUsedAsEndEntity))
}

/// What a worker presents: a client certificate, with those that lead from it to the authority if there are any, and its
/// key.
pub struct ClientIdentity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl ClientIdentity {
    /// From their PEM texts.
    ///
    /// # Errors
    /// [`ClientError::Pem`], or [`ClientError::NotClient`].
    pub fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Self, ClientError> {
        let read = |source| ClientError::Pem { what: "private key", source };
        let chain = certificates(certificate)?;
        if chain.first().and_then(is_authority) == Some(true) {
            return Err(ClientError::NotClient);
        }
        Ok(Self { chain, key: PrivateKeyDer::from_pem_slice(key).map_err(read)? })
    }
}

/// Without the key.
impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientIdentity(…)")
    }
}

/// The names of the client certificate that the other side presented and the handshake verified, in lower case; empty if
/// it presented none, or one without DNS names.
pub fn client_names(connection: &Connection) -> Vec<String> {
    let Some(identity) = connection.peer_identity() else { return Vec::new() };
    let Ok(chain) = identity.downcast::<Vec<CertificateDer<'static>>>() else { return Vec::new() };
    chain.first().map_or(Vec::new(), dns_names)
}

fn dns_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    match EndEntityCert::try_from(certificate) {
        Ok(certificate) => certificate.valid_dns_names().map(str::to_ascii_lowercase).collect(),
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(authority: &Authority, client: &PemPair) -> Result<Vec<String>, rustls::Error> {
        let verifier = ClientAuthority::from_pem(authority.to_pem().certificate.as_bytes()).unwrap();
        let certificate = CertificateDer::from_pem_slice(client.certificate.as_bytes()).unwrap();
        verifier.0.verify_client_cert(&certificate, &[], UnixTime::now())?;
        Ok(dns_names(&certificate))
    }

    #[test]
    fn an_authority_is_known_by_its_key_and_clients_by_their_names() {
        let (ours, theirs) = (Authority::generate(30).unwrap(), Authority::generate(30).unwrap());
        let again = ours.to_pem();
        let again = Authority::from_pem(&again.certificate, &again.key).unwrap();
        let client = again.sign("node-1.example", 7).unwrap();
        assert_eq!(verified(&ours, &client).unwrap(), ["node-1.example"]);
        assert!(verified(&theirs, &client).is_err());
        ClientIdentity::from_pem(client.certificate.as_bytes(), client.key.as_bytes()).unwrap();

        let mixed = Authority::from_pem(&ours.to_pem().certificate, &theirs.to_pem().key).unwrap();
        assert!(matches!(mixed.sign("node-2", 7), Err(ClientError::OtherKey(_))));
    }

    #[test]
    fn a_client_certificate_signs_nobody_and_expires() {
        let authority = Authority::generate(30).unwrap();
        let client = authority.sign("node-1", 7).unwrap();
        let as_authority = Authority::from_pem(&client.certificate, &client.key).unwrap();
        assert!(as_authority.sign("node-2", 7).is_err());
        let verifier = ClientAuthority::from_pem(authority.to_pem().certificate.as_bytes()).unwrap();
        let certificate = CertificateDer::from_pem_slice(client.certificate.as_bytes()).unwrap();
        let at = |days: u64| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            UnixTime::since_unix_epoch(now + Duration::from_secs(days * 86_400))
        };
        assert!(verifier.0.verify_client_cert(&certificate, &[], at(6)).is_ok());
        assert!(verifier.0.verify_client_cert(&certificate, &[], at(8)).is_err());
    }

    #[test]
    fn texts_without_what_they_should_hold_are_refused() {
        let pair = Authority::generate(1).unwrap().to_pem();
        for bad in ["", "hello", &pair.key, "-----BEGIN CERTIFICATE-----\nAAAA"] {
            assert!(ClientAuthority::from_pem(bad.as_bytes()).is_err(), "{bad}");
            assert!(ClientIdentity::from_pem(bad.as_bytes(), pair.key.as_bytes()).is_err(), "{bad}");
        }
        let client = Authority::generate(1).unwrap().sign("node-1", 1).unwrap();
        let keyless = ClientIdentity::from_pem(client.certificate.as_bytes(), b"");
        assert!(matches!(keyless, Err(ClientError::Pem { what: "private key", .. })));
        let empty = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(ClientAuthority::from_pem(empty.as_bytes()), Err(ClientError::Authority(_))));
        let many = pair.certificate.repeat(AUTHORITIES_MAX + 1);
        assert!(matches!(ClientAuthority::from_pem(many.as_bytes()), Err(ClientError::TooMany)));
    }

    #[test]
    fn an_authority_is_no_client_and_a_client_no_authority() {
        let authority = Authority::generate(30).unwrap();
        let (of_authority, client) = (authority.to_pem(), authority.sign("node-1", 7).unwrap());
        let error = ClientAuthority::from_pem(client.certificate.as_bytes()).unwrap_err();
        assert!(
            matches!(error, ClientError::NotAuthority) && error.to_string().contains("ca.pem"),
            "{error}"
        );
        let both = format!("{}{}", of_authority.certificate, client.certificate);
        assert!(matches!(ClientAuthority::from_pem(both.as_bytes()), Err(ClientError::NotAuthority)));
        let identity =
            |pair: &PemPair| ClientIdentity::from_pem(pair.certificate.as_bytes(), pair.key.as_bytes());
        let error = identity(&of_authority).unwrap_err();
        assert!(error.to_string().contains("cert client"), "{error}");
        identity(&client).unwrap();
        // What has expired, or is not valid yet, is what it was.
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        for (from, to) in [(now - 3 * day, now - 2 * day), (now + 2 * day, now + 3 * day)] {
            let key = KeyPair::generate().unwrap();
            let mut params = authority_params(1).unwrap();
            (params.not_before, params.not_after) = (from.into(), to.into());
            let certificate = params.clone().self_signed(&key).unwrap();
            assert_eq!(is_authority(certificate.der()), Some(true));
            params.is_ca = IsCa::ExplicitNoCa;
            params.key_usages = Vec::new();
            let certificate = params.self_signed(&key).unwrap();
            assert_eq!(is_authority(certificate.der()), Some(false));
        }
    }

    #[test]
    fn keys_do_not_show_themselves() {
        let pair = Authority::generate(1).unwrap().sign("node-1", 1).unwrap();
        assert!(!format!("{pair:?}").contains("PRIVATE"));
        let identity = ClientIdentity::from_pem(pair.certificate.as_bytes(), pair.key.as_bytes()).unwrap();
        assert_eq!(format!("{identity:?}"), "ClientIdentity(…)");
    }
}
