//! CRC-32C, eight bytes at a time.

/// Castagnoli's polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `TABLES[n][byte]`: what a byte does to the sum when `n` more bytes follow it.
static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { (sum >> 1) ^ POLYNOMIAL } else { sum >> 1 };
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// A sum in the making.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checksum(u32);

impl Checksum {
    pub(super) fn new() -> Self {
        Self(!0)
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        let mut sum = self.0;
        let look_up = |table: usize, byte: u8| TABLES[table][usize::from(byte)];
        let (eights, rest) = bytes.as_chunks::<8>();
        for &[a, b, c, d, e, f, g, h] in eights {
            let [w, x, y, z] = (sum ^ u32::from_le_bytes([a, b, c, d])).to_le_bytes();
            sum = look_up(7, w)
                ^ look_up(6, x)
                ^ look_up(5, y)
                ^ look_up(4, z)
                ^ look_up(3, e)
                ^ look_up(2, f)
                ^ look_up(1, g)
                ^ look_up(0, h);
        }
        for &byte in rest {
            sum = (sum >> 8) ^ look_up(0, sum.to_le_bytes()[0] ^ byte);
        }
        self.0 = sum;
    }

    pub(super) fn value(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(bytes: &[u8]) -> u32 {
        let mut sum = Checksum::new();
        sum.add(bytes);
        sum.value()
    }

    /// The examples of RFC 3720, B.4, and the usual one.
    #[test]
    fn the_known_sums_come_out() {
        assert_eq!(sum(b"123456789"), 0xe306_9283);
        assert_eq!(sum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(sum(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(sum(b""), 0);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(bytes: Vec<u8>, at: prop::sample::Index) {
            let (first, second) = bytes.split_at(at.index(bytes.len() + 1));
            let mut cut = Checksum::new();
            cut.add(first);
            cut.add(second);
            prop_assert_eq!(cut.value(), sum(&bytes));
        }
    }
}
