"""The count of instructions in a listing by hand: which loops it counts, and which path through them."""

import pytest

from benchmarks.gpu_model import sass

KERNEL = "_ZN3rlk12fused_policyI13__nv_bfloat16S1_Li256ELi4ELb1EEEvNS_4RowsE"

# A loop over a row with a path for a mask, one for a narrow row and one out of line; an outer loop around it; the loop
# of the gradient; a loop over something else.
LISTING = """
		Function : {name}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
                                                                   /* 0x000fe20000000f00 */
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0020*/                   LDS.128 R4, [R2] ;
        /*0030*/                   FADD R5, R4, R5 ;
        /*0040*/              @!P1 BRA 0x80 ;
        /*0050*/                   LDG.E.U8 R6, desc[UR4][R8.64] ;
        /*0060*/                   FSEL R5, R5, -INF , P2 ;
        /*0070*/                   FSEL R4, R4, -INF , P2 ;
        /*0080*/                   BRA P3, 0x100 ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R8.64] ;
        /*00a0*/                   MUFU.EX2 R7, R5 ;
        /*00b0*/               @P0 BRA 0x20 ;
        /*00c0*/               @P4 BRA 0x10 ;
        /*00d0*/                   BRA 0x120 ;
        /*00e0*/                   NOP ;
        /*0100*/                   MUFU.EX2 R7, R5 ;
        /*0110*/                   BRA 0xb0 ;
        /*0120*/                   LDS.128 R4, [R2] ;
        /*0130*/                   LDS.128 R8, [R2+0x10] ;
        /*0140*/                   F2FP.BF16.F32.PACK_AB R4, R5, R4 ;
        /*0150*/                   STG.E.EF.128 desc[UR4][R8.64], R4 ;
        /*0160*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0170*/               @P0 BRA 0x120 ;
        /*0180*/                   LDS R4, [R2] ;
        /*0190*/               @P0 BRA 0x180 ;
        /*01a0*/                   EXIT ;
        /*01b0*/                   BRA 0x1b0;
"""


@pytest.fixture
def code():
    (found,) = sass.parse(LISTING.format(name=KERNEL)).values()
    return found


def test_the_path_that_moves_most_counts_and_of_those_the_shortest(code):
    loops = sass.hot_loops(code)
    assert set(loops) == {"statistics", "gradient"}
    path = [hex(i.address) for i in loops["statistics"].path]
    assert path == [hex(a) for a in (0x20, 0x30, 0x40, 0x80, 0x90, 0xA0, 0xB0)], "with the copy, without the mask"
    assert loops["statistics"].code_bytes == 16 * 12, "every path, out of line and within, but not the outer loop"
    assert [i.name for i in loops["gradient"].path][-3:] == ["STG.E.EF.128", "UIADD3", "BRA"]


def test_counts_are_per_element_and_by_pipe(code):
    told = sass.count(code, sass.short(KERNEL))
    assert told["statistics"]["elements"] == 8 and told["statistics"]["per_element"] == round(7 / 8, 2)
    assert told["gradient"]["elements"] == 16 and told["gradient"]["per_element"] == round(6 / 16, 2)
    assert told["gradient"]["pipes"] == {"control": 0.06, "conversion": 0.06, "memory": 0.19, "uniform": 0.06}


def test_a_pair_of_logits_is_one_element_where_there_is_a_reference():
    assert sass.short(KERNEL) == "fused_policy<bf16,bf16,256,4,1>"
    sizes = {
        "fused_policy<bf16,bf16,256,4,1>": 2,
        "fused_policy<fp32,bf16,256,4,1>": 4,
        "token_stats<bf16,1,512>": 2,
        "token_stats<bf16,5,512>": 4,
        "token_stats<fp32,7,512>": 8,
        "token_stats_backward<bf16,bf16,0,256>": 2,
        "token_stats_backward<bf16,bf16,1,256>": 4,
    }
    assert {kernel: sass.element_bytes(kernel) for kernel in sizes} == sizes
    assert sass.short("_ZN3rlk3gaeIfLi256ELi8EEEvNS_6GaeJobIT_EE") == "gae<fp32,256,8>"


def test_without_the_program_that_reads_machine_code_the_command_says_where_it_was_looked_for(monkeypatch, capsys):
    monkeypatch.setattr(sass, "tool", lambda: None)
    with pytest.raises(SystemExit):
        sass.main(["x.cubin"])
    assert "cuobjdump was found neither on PATH" in capsys.readouterr().err
