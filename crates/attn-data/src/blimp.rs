//! BLiMP: pairs of sentences that differ in little, of which one is English.
//!
//! Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English",
//! <https://arxiv.org/abs/1912.00582>; 67 paradigms of 1,000 pairs each.

use crate::dataset::DatasetSpec;

/// A kind of pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paradigm {
    /// Its name, which is that of its configuration in the data set.
    pub name: &'static str,
    /// `morphology`, `syntax`, `semantics` or `syntax_semantics`.
    pub field: &'static str,
    /// The phenomenon, the data's `linguistics_term`; the paper (table 2) counts `s-selection` as argument structure.
    pub term: &'static str,
}

/// All 67, by name.
pub fn paradigms() -> impl Iterator<Item = Paradigm> {
    PARADIGMS.iter().map(|&(name, field, term)| Paradigm { name, field, term })
}

impl Paradigm {
    /// Its pairs in the data set that `of` names: the good sentence is the text, the bad one the second text.
    pub fn data(&self, of: &DatasetSpec) -> DatasetSpec {
        DatasetSpec { config: Some(self.name.to_owned()), ..of.clone() }
    }
}

const PARADIGMS: [(&str, &str, &str); 67] = [
    ("adjunct_island", "syntax", "island_effects"),
    ("anaphor_gender_agreement", "morphology", "anaphor_agreement"),
    ("anaphor_number_agreement", "morphology", "anaphor_agreement"),
    ("animate_subject_passive", "syntax", "s-selection"),
    ("animate_subject_trans", "syntax", "s-selection"),
    ("causative", "syntax", "argument_structure"),
    ("complex_NP_island", "syntax", "island_effects"),
    ("coordinate_structure_constraint_complex_left_branch", "syntax", "island_effects"),
    ("coordinate_structure_constraint_object_extraction", "syntax", "island_effects"),
    ("determiner_noun_agreement_1", "morphology", "determiner_noun_agreement"),
    ("determiner_noun_agreement_2", "morphology", "determiner_noun_agreement"),
    ("determiner_noun_agreement_irregular_1", "morphology", "determiner_noun_agreement"),
    ("determiner_noun_agreement_irregular_2", "morphology", "determiner_noun_agreement"),
    ("determiner_noun_agreement_with_adj_2", "morphology", "determiner_noun_agreement"),
    ("determiner_noun_agreement_with_adj_irregular_1", "morphology", "determiner_noun_agreement"),
    ("determiner_noun_agreement_with_adj_irregular_2", "morphology", "determiner_noun_agreement"),
    ("determiner_noun_agreement_with_adjective_1", "morphology", "determiner_noun_agreement"),
    ("distractor_agreement_relational_noun", "morphology", "subject_verb_agreement"),
    ("distractor_agreement_relative_clause", "morphology", "subject_verb_agreement"),
    ("drop_argument", "syntax", "argument_structure"),
    ("ellipsis_n_bar_1", "syntax", "ellipsis"),
    ("ellipsis_n_bar_2", "syntax", "ellipsis"),
    ("existential_there_object_raising", "syntax_semantics", "control_raising"),
    ("existential_there_quantifiers_1", "semantics", "quantifiers"),
    ("existential_there_quantifiers_2", "semantics", "quantifiers"),
    ("existential_there_subject_raising", "syntax_semantics", "control_raising"),
    ("expletive_it_object_raising", "syntax_semantics", "control_raising"),
    ("inchoative", "syntax", "argument_structure"),
    ("intransitive", "syntax", "argument_structure"),
    ("irregular_past_participle_adjectives", "morphology", "irregular_forms"),
    ("irregular_past_participle_verbs", "morphology", "irregular_forms"),
    ("irregular_plural_subject_verb_agreement_1", "morphology", "subject_verb_agreement"),
    ("irregular_plural_subject_verb_agreement_2", "morphology", "subject_verb_agreement"),
    ("left_branch_island_echo_question", "syntax", "island_effects"),
    ("left_branch_island_simple_question", "syntax", "island_effects"),
    ("matrix_question_npi_licensor_present", "semantics", "npi_licensing"),
    ("npi_present_1", "semantics", "npi_licensing"),
    ("npi_present_2", "semantics", "npi_licensing"),
    ("only_npi_licensor_present", "semantics", "npi_licensing"),
    ("only_npi_scope", "syntax_semantics", "npi_licensing"),
    ("passive_1", "syntax", "argument_structure"),
    ("passive_2", "syntax", "argument_structure"),
    ("principle_A_c_command", "syntax_semantics", "binding"),
    ("principle_A_case_1", "syntax_semantics", "binding"),
    ("principle_A_case_2", "syntax_semantics", "binding"),
    ("principle_A_domain_1", "syntax_semantics", "binding"),
    ("principle_A_domain_2", "syntax_semantics", "binding"),
    ("principle_A_domain_3", "syntax_semantics", "binding"),
    ("principle_A_reconstruction", "syntax_semantics", "binding"),
    ("regular_plural_subject_verb_agreement_1", "morphology", "subject_verb_agreement"),
    ("regular_plural_subject_verb_agreement_2", "morphology", "subject_verb_agreement"),
    ("sentential_negation_npi_licensor_present", "semantics", "npi_licensing"),
    ("sentential_negation_npi_scope", "syntax_semantics", "npi_licensing"),
    ("sentential_subject_island", "syntax", "island_effects"),
    ("superlative_quantifiers_1", "semantics", "quantifiers"),
    ("superlative_quantifiers_2", "semantics", "quantifiers"),
    ("tough_vs_raising_1", "syntax_semantics", "control_raising"),
    ("tough_vs_raising_2", "syntax_semantics", "control_raising"),
    ("transitive", "syntax", "argument_structure"),
    ("wh_island", "syntax", "island_effects"),
    ("wh_questions_object_gap", "syntax", "filler_gap_dependency"),
    ("wh_questions_subject_gap", "syntax", "filler_gap_dependency"),
    ("wh_questions_subject_gap_long_distance", "syntax", "filler_gap_dependency"),
    ("wh_vs_that_no_gap", "syntax", "filler_gap_dependency"),
    ("wh_vs_that_no_gap_long_distance", "syntax", "filler_gap_dependency"),
    ("wh_vs_that_with_gap", "syntax", "filler_gap_dependency"),
    ("wh_vs_that_with_gap_long_distance", "syntax", "filler_gap_dependency"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// As table 2 of the paper counts them.
    #[test]
    fn there_are_thirteen_phenomena_in_four_fields() {
        let of = |part: fn(&Paradigm) -> &'static str| -> BTreeSet<&str> {
            paradigms().map(|paradigm| part(&paradigm)).collect()
        };
        assert_eq!(of(|paradigm| paradigm.name).len(), 67);
        assert_eq!(of(|paradigm| paradigm.field).len(), 4);
        assert_eq!(of(|paradigm| paradigm.term).len(), 13);
        let islands = paradigms().filter(|paradigm| paradigm.term == "island_effects");
        assert_eq!(islands.count(), 8);
    }
}
