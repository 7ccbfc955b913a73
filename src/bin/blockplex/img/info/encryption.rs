//! What is told of an image's encryption.

use blockplex::drivers::crypto::SECTOR;
use blockplex::drivers::crypto::iv::IvAlgorithm;
use blockplex::drivers::crypto::luks::LuksHeader;
use blockplex::drivers::qcow2::EncryptionInformation;

use crate::tool::json::Json;

/// Of a qcow2 image.
pub fn of_qcow2(encryption: &EncryptionInformation) -> Json {
    let format = encryption.format().name();
    match encryption {
        EncryptionInformation::Aes => Json::Object(vec![("format", format.into())]),
        EncryptionInformation::Luks(header) => luks(header, Some(format)),
    }
}

/// Of a LUKS header, in the peer's order.
pub fn luks(header: &LuksHeader, format: Option<&'static str>) -> Json {
    let suite = &header.suite;
    let mut members: Vec<(&'static str, Json)> = vec![
        ("ivgen-alg", suite.iv.name().into()),
        ("detached-header", false.into()),
        ("hash-alg", header.hash.name().into()),
        ("cipher-alg", suite.algorithm.name().into()),
        ("uuid", header.uuid.as_str().into()),
    ];
    let hash = suite.iv_hash.filter(|_| suite.iv == IvAlgorithm::Essiv);
    members.extend(hash.map(|hash| ("ivgen-hash-alg", hash.name().into())));
    members.extend(format.map(|format| ("format", format.into())));
    members.push(("cipher-mode", suite.mode.name().into()));
    let slots = header.slots.iter().map(|slot| {
        let mut members: Vec<(&'static str, Json)> = vec![("active", slot.active.into())];
        members.extend(slot.active.then(|| ("iters", u64::from(slot.iterations).into())));
        let offset = u64::from(slot.material_sector) * SECTOR as u64;
        members.push(("key-offset", offset.into()));
        members.extend(slot.active.then(|| ("stripes", u64::from(slot.stripes).into())));
        Json::Object(members)
    });
    members.push(("slots", Json::List(slots.collect())));
    members.push(("payload-offset", header.payload_offset().into()));
    members.push(("master-key-iters", u64::from(header.digest_iterations).into()));
    Json::Object(members)
}
