"""The models that mixing is checked on: with random weights, as small as they come, each with batches for it. A library is imported when
its first model is made."""
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, nn, noop
from fastai.callback.progress import ProgressCallback

N,CLASSES,VOCAB,BATCHES = 5,4,50,10
LENGTHS = 11,8,5,9,6

LOSSES = dict(classes=CrossEntropyLossFlat, pixels=partial(CrossEntropyLossFlat, axis=1), tokens=CrossEntropyLossFlat, numbers=MSELossFlat)

@dataclass
class Entry:
    "A model, and how to train it"
    name:str
    library:str # As it is called where it is installed from
    model:callable = None # Returns the model
    batch:callable = None # Returns the inputs of a batch, a tuple
    targets:callable = lambda: torch.randint(CLASSES, (N,)) # Returns the target of a batch
    loss:str = 'classes' # What the targets are, and so the loss: one of `LOSSES`
    parts:callable = None # The weight and predictions of each loss, where the model returns more than a tensor: their sum is the loss
    keeps:str = 'nothing' # Embeddings with this in their names keep what is each item's own
    cbs:callable = list # Returns the callbacks that the model needs
    learn:callable = None # Returns a Learner that the library makes of its own data, instead of `model`, `batch` and `targets`
    own_loss:callable = None # Returns the loss function of the library, whose targets are numbers

    @property
    def loss_func(self):
        loss = self.own_loss() if self.own_loss else LOSSES[self.loss]()
        return (lambda pred,y: sum(w*loss(o, y) for w,o in self.parts(pred))) if self.parts else loss

    def _learner(self):
        dls = DataLoaders([(*self.batch(), self.targets()) for _ in range(BATCHES)]*3, [], device='cpu')
        dls.n_inp = len(self.batch())
        return Learner(dls, self.model(), self.loss_func, SGD, lr=1e-3, cbs=self.cbs())

    def learner(self, *cbs):
        "A Learner with some batches, each of which comes three times"
        learn = (self.learn or self._learner)()
        learn.remove_cbs(learn._grab_cbs(ProgressCallback))
        learn.logger = noop
        return learn.add_cbs(cbs)

def attribute(module, name, *args, **kwargs): return lambda: getattr(import_module(module), name)(*args, **kwargs)
def floats(*shape): return lambda: (torch.randn(N, *shape),)
def images(size=64): return floats(3, size, size)
def pixels(size): return lambda: torch.randint(CLASSES, (N, size, size))
def numbers(n=1): return lambda: torch.randn(N, n)
def words(): return torch.randint(3, VOCAB, (N, max(LENGTHS)))

# timm

def timm(name, size=64, **kwargs):
    return Entry(name, 'timm', attribute('timm', 'create_model', name, num_classes=CLASSES, **kwargs), images(size))

SHALLOW = dict(img_size=64, embed_dim=96, depth=4, num_heads=3)
TIMM = [
    timm('vit_tiny_patch16_224', img_size=64), timm('deit_tiny_distilled_patch16_224', img_size=64, depth=4),
    timm('beit_base_patch16_224', **SHALLOW),
    timm('vit_small_patch16_dinov3', **SHALLOW), timm('eva02_tiny_patch14_224', 56, img_size=56, depth=4),
    timm('samvit_base_patch16', **SHALLOW),
    timm('naflexvit_base_patch16_gap', embed_dim=96, depth=4, num_heads=3), timm('cait_xxs24_224', img_size=64),
    timm('xcit_nano_12_p16_224', img_size=64),
    timm('swin_tiny_patch4_window7_224', img_size=64, window_size=2, embed_dim=24), timm('swinv2_cr_tiny_224', img_size=64),
    timm('twins_svt_small', img_size=64),
    timm('maxvit_pico_rw_256', img_size=64), timm('coatnet_pico_rw_224', img_size=64), timm('pvt_v2_b0'), timm('mobilevit_xxs'),
    timm('poolformer_s12'),
    timm('edgenext_xx_small'), timm('efficientvit_b0'), timm('visformer_tiny', img_size=64),
    timm('mixer_s32_224', img_size=64), timm('resmlp_12_224', img_size=64), timm('gmlp_ti16_224', img_size=64),
    timm('convnext_atto'), timm('convnextv2_atto'), timm('mambaout_femto'), timm('starnet_s050'), timm('fastvit_t8'),
    timm('efficientnet_b0'), timm('mobilenetv3_small_050'), timm('mobilenetv4_conv_small_035'), timm('ghostnet_050'), timm('regnetx_002'),
    timm('resnet18'),
    timm('resnetv2_18'), timm('test_nfnet'), timm('repvgg_a0'), timm('densenet121'), timm('dla34'), timm('inception_v3', 96)]

# torchvision

def compiled(): return torch.compile(import_module('torchvision.models').resnet18(num_classes=CLASSES), backend='eager')

def torchvision(name, batch=None, where='torchvision.models', weights=('weights',), **kwargs):
    extra = {k: kwargs.pop(k) for k in ('targets', 'loss', 'parts') if k in kwargs}
    return Entry(name, 'torchvision', attribute(where, name, **dict.fromkeys(weights), num_classes=CLASSES, **kwargs), batch or images(),
        **extra)

def segmentation(name, **kwargs):
    return torchvision(name, images(32), 'torchvision.models.segmentation', ('weights', 'weights_backbone'), targets=pixels(32),
        loss='pixels',
                       parts=lambda out: [(w, out[k]) for w,k in ((1., 'out'), (.5, 'aux')) if k in out], **kwargs)

def video(name): return torchvision(name, floats(3, 4, 32, 32), 'torchvision.models.video')

def googlenet_parts(out): return [(1., out.logits), (.3, out.aux_logits1), (.3, out.aux_logits2)]

TORCHVISION = [
    torchvision('alexnet'), torchvision('vgg11_bn', images(32)), torchvision('resnet18'), torchvision('resnext50_32x4d'),
    torchvision('densenet121'),
    torchvision('squeezenet1_1'), torchvision('shufflenet_v2_x0_5'),
    torchvision('mobilenet_v2'), torchvision('mobilenet_v3_small'), torchvision('mnasnet0_5'), torchvision('regnet_y_400mf'),
    torchvision('efficientnet_b0'),
    torchvision('efficientnet_v2_s'),
    torchvision('convnext_tiny'), torchvision('vit_b_16', images(32), image_size=32), torchvision('swin_t'), torchvision('swin_v2_t'),
    Entry('MaxVit', 'torchvision', attribute('torchvision.models.maxvit', 'MaxVit', (64, 64), 16, 2, [16, 32], [1, 1], 8, 0.,
    num_classes=CLASSES), images()),
    torchvision('googlenet', aux_logits=True, init_weights=False, parts=googlenet_parts),
    Entry('resnet18, torch.compile', 'torchvision', compiled, images()),
    segmentation('fcn_resnet50', aux_loss=True), segmentation('deeplabv3_mobilenet_v3_large', aux_loss=True),
    segmentation('lraspp_mobilenet_v3_large'),
    video('r3d_18'), video('mc3_18'), video('r2plus1d_18')]

# transformers

class OwnLoss(nn.Module):
    "A model that takes its labels among the inputs and returns a loss"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, batch): return self.model(**batch).loss

class Logits(nn.Module):
    "What turns a model of transformers into one for fastai: takes a batch as a dict, returns the logits"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, batch): return self.model(**batch).logits

def mask(): return (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:,None]).long()

def padded(end=None):
    "Texts of different lengths, padded with 0"
    ids = words()*mask()
    if end is not None: ids[range(N),torch.tensor(LENGTHS)-1] = end
    return ids

def as_dict(end=None, **more): return lambda: (dict(input_ids=padded(end), attention_mask=mask(), **{k: f() for k,f in more.items()}),)
def as_tuple(): return padded(),mask()
def types(): return torch.randint(2, (N, max(LENGTHS)))
def named(name, *shape): return lambda: ({name: torch.randn(N, *shape)},)
def said(out): return [(1., out.logits)]

SMALL = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)

def build(kind, head, wrap, config):
    transformers = import_module('transformers')
    model = getattr(transformers, f'{kind}{head}')(getattr(transformers, f'{kind}Config')(num_labels=CLASSES, **config))
    return wrap(model)

def hugging(kind, head='ForSequenceClassification', batch=as_dict(), name=None, wrap=Logits, config=SMALL, extra=None, **kwargs):
    return Entry(name or f'{kind}{head}', 'transformers', partial(build, kind, head, wrap, config | kwargs), batch, **extra or {})

def picture(kind, size=32, **kwargs):
    return hugging(kind, 'ForImageClassification', named('pixel_values', 3, size, size), config=dict(image_size=size), **kwargs)

SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
SOUND = SIZES | dict(conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, classifier_proj_size=8)
SOUND_T = SIZES | dict(d_model=16, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=32, classifier_proj_size=8)
ROBERTA = dict(extra=dict(keeps='position_embeddings'))
TOKEN = dict(targets=words, loss='tokens')
HUGGING = [
    hugging('Bert'), hugging('Bert', batch=as_dict(token_type_ids=types), name='BertForSequenceClassification, token types'),
    hugging('Bert', batch=as_tuple, wrap=noop, name='BertForSequenceClassification, ModelOutput', extra=dict(parts=said)),
    hugging('Bert', name='BertForSequenceClassification, eager', attn_implementation='eager'),
    hugging('Bert', 'ForTokenClassification', extra=dict(targets=lambda: torch.randint(CLASSES, (N, max(LENGTHS))), loss='tokens')),
    hugging('Bert', 'ForMaskedLM', extra=TOKEN), hugging('DistilBert', dim=16, n_layers=3, n_heads=2, hidden_dim=32),
    hugging('Roberta', **ROBERTA),
    hugging('XLMRoberta', **ROBERTA), hugging('MPNet', **ROBERTA),
    hugging('Albert', embedding_size=8), hugging('DebertaV2'),
    hugging('DebertaV2', name='DebertaV2ForSequenceClassification, relative', relative_attention=True, pos_att_type=['p2c', 'c2p']),
    hugging('Electra', embedding_size=8), hugging('ConvBert', embedding_size=16),
    hugging('MobileBert', embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16), hugging('SqueezeBert', embedding_size=16),
    hugging('RoFormer', embedding_size=16),
    hugging('Nystromformer', num_landmarks=11, segment_means_seq_len=11), hugging('BigBird', attention_type='original_full'),
    hugging('Longformer', attention_window=4, **ROBERTA), hugging('Funnel', config=dict(vocab_size=VOCAB, pad_token_id=0),
    d_model=16, block_sizes=[1, 1], n_head=2, d_head=8, d_inner=32),
    hugging('XLNet', config=dict(vocab_size=VOCAB, pad_token_id=0), d_model=16, n_layer=3, n_head=2, d_inner=32),
    hugging('FNet', batch=lambda: (dict(input_ids=words()),)), hugging('ModernBert'),
    hugging('GPT2', n_embd=16, n_layer=3, n_head=2, n_positions=32), hugging('GPTNeoX'),
    hugging('OPT', ffn_dim=32, word_embed_proj_dim=16, extra=dict(keeps='embed_positions')), hugging('Bloom', n_layer=3, n_head=2),
    hugging('Llama'), hugging('Mistral', num_key_value_heads=2), hugging('Qwen2', num_key_value_heads=2),
    hugging('Qwen3', num_key_value_heads=2, head_dim=8),
    hugging('Gemma', num_key_value_heads=2, head_dim=8), hugging('Phi'),
    hugging('T5', batch=as_dict(end=2), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    hugging('Bart', batch=as_dict(end=2), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32),
    hugging('Bert', batch=as_dict(labels=lambda: torch.randint(CLASSES, (N,))),
    name='BertForSequenceClassification, loss of its own', wrap=OwnLoss, extra=dict(own_loss=lambda: lambda pred,y: pred)),
    hugging('Llama', 'ForCausalLM', name='LlamaForCausalLM', extra=TOKEN),
    picture('ViT', patch_size=8, **SIZES), picture('DeiT', patch_size=8, **SIZES), picture('Beit', patch_size=8, **SIZES),
    picture('Dinov2', patch_size=8, **SIZES),
    picture('Swin', patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
    picture('Swinv2', patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
    picture('ConvNext', hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1]),
    picture('ResNet', hidden_sizes=[8, 8, 16, 16], embedding_size=8, depths=[1, 1, 2, 1], layer_type='basic'),
    picture('MobileViT', 64), picture('Segformer', 64, hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16),
    hugging('Segformer', 'ForSemanticSegmentation', named('pixel_values', 3, 64, 64),
    config=dict(hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16),
    extra=dict(targets=pixels(16), loss='pixels')),
    hugging('Wav2Vec2', batch=named('input_values', 900), config=SOUND, mask_time_prob=0.),
    hugging('Hubert', batch=named('input_values', 900),
    config=SOUND, mask_time_prob=0.), hugging('WavLM', batch=named('input_values', 900), config=SOUND, mask_time_prob=0.),
    hugging('Whisper', 'ForAudioClassification', named('input_features', 8, 64), config=SOUND_T),
    hugging('AST', 'ForAudioClassification', named('input_values', 64, 16), config=SIZES, max_length=64, num_mel_bins=16),
    hugging('VideoMAE', 'ForVideoClassification', named('pixel_values', 4, 3, 32, 32), config=SIZES, image_size=32, patch_size=8,
    num_frames=4),
    hugging('Timesformer', 'ForVideoClassification', named('pixel_values', 4, 3, 32, 32), config=SIZES, image_size=32, patch_size=8,
    num_frames=4)]

# fastai

def text_config(name): return getattr(import_module('fastai.text.models'), name) | dict(emb_sz=8, n_hid=10, n_layers=2, embed_p=0.)

def text_classifier():
    text = import_module('fastai.text.all')
    return text.get_text_classifier(text.AWD_LSTM, VOCAB, CLASSES, seq_len=8, config=text_config('awd_lstm_clas_config'))

def language_model():
    text = import_module('fastai.text.all')
    return text.get_language_model(text.AWD_LSTM, VOCAB, config=text_config('awd_lstm_lm_config'))

def resetter(): return import_module('fastai.text.all').rnn_cbs()
def vision_model():
    vision = import_module('fastai.vision.all')
    return vision.create_vision_model(vision.resnet18, CLASSES, pretrained=False)
def unet():
    vision = import_module('fastai.vision.all')
    return vision.create_unet_model(vision.resnet18, CLASSES, (32, 32), pretrained=False)
def ids(n): return lambda: (torch.randint(1, VOCAB, (N, n)),)
def row(): return torch.randint(VOCAB, (N, 2)),torch.randn(N, 3)
def fastai(name, *args, **kwargs): return Entry(name, 'fastai', *args, **kwargs)

FASTAI = [
    fastai('xresnet18', attribute('fastai.vision.all', 'xresnet18', n_out=CLASSES), images()),
    fastai('vision_learner resnet18', vision_model, images()),
    fastai('unet_learner resnet18', unet, images(32), pixels(32), 'pixels'),
    fastai('TabularModel', attribute('fastai.tabular.all', 'TabularModel', [(VOCAB, 6), (VOCAB, 4)], 3, CLASSES, [20, 10]), row),
    fastai('TabularModel, regression', attribute('fastai.tabular.all', 'TabularModel', [(VOCAB, 6), (VOCAB, 4)], 3, 1, [20, 10]), row,
    numbers(), 'numbers'),
    fastai('AWD_LSTM classifier', text_classifier, lambda: (words(),), cbs=resetter),
    fastai('AWD_LSTM language model', language_model, lambda: (words(),), words, 'tokens', cbs=resetter),
    fastai('EmbeddingDotBias', attribute('fastai.collab', 'EmbeddingDotBias', 8, VOCAB, VOCAB, (0, 5)), ids(2), lambda: torch.rand(N)*5,
    'numbers'),
    fastai('EmbeddingNN', attribute('fastai.collab', 'EmbeddingNN', [(VOCAB, 6), (VOCAB, 4)], [20], y_range=(0, 5)), ids(2),
    lambda: torch.rand(N, 1)*5, 'numbers')]

# tsai

ITEMS,TRAIN = BATCHES*N*3,list(range(BATCHES*N*3-N))
VALID = list(range(TRAIN[-1]+1, ITEMS))

def series(arch, module=None, regression=False):
    core,learner = import_module('tsai.data.core'),import_module('tsai.learner')
    x,y = np.random.randn(ITEMS, 3, 40).astype('float32'),np.random.randn(ITEMS).astype('float32') if regression else np.random.randint(
        CLASSES, size=ITEMS)
    tfms = [None, core.TSRegression() if regression else core.TSClassification()]
    dls = core.get_ts_dls(x, y, splits=(TRAIN, VALID), tfms=tfms, bs=N, num_workers=0, device='cpu')
    return learner.ts_learner(dls, getattr(import_module(f'tsai.models.{module or arch}'), arch))

def tsai(arch, module=None): return Entry(f'{arch}, ts_learner', 'tsai', learn=partial(series, arch, module))

TSAI = [*map(tsai, '''InceptionTime InceptionTimePlus ResNet ResNetPlus XceptionTime FCN FCNPlus ResCNN OmniScaleCNN XCM 
    MLP gMLP TCN TST TSTPlus TSiTPlus TSSequencerPlus
    mWDN'''.split()), tsai('LSTM', 'RNN'), tsai('GRU', 'RNN'), tsai('LSTMPlus', 'RNNPlus'), tsai('LSTM_FCN', 'RNN_FCN'),
    Entry('InceptionTimePlus, ts_learner, regression', 'tsai', loss='numbers', learn=partial(series, 'InceptionTimePlus', regression=True))]

# fastMONAI

def volumes(mask):
    "Volumes in files, read by fastMONAI, with masks or classes"
    nib,pd,med = import_module('nibabel'),import_module('pandas'),import_module('fastMONAI.vision_all')
    folder,rows = Path(mkdtemp()),[]
    for i in range(ITEMS):
        for name,v in ('x', np.random.rand(16, 16, 16)), ('y', np.random.rand(16, 16, 16) > .5):
            nib.save(nib.Nifti1Image(v.astype('float32'), np.eye(4)),
    folder/f'{name}{i}.nii')
        rows.append(dict(x=folder/f'x{i}.nii', y=folder/f'y{i}.nii' if mask else f'c{i%CLASSES}', is_val=i >= len(TRAIN)))
    block = med.MedDataBlock(blocks=(med.ImageBlock(cls=med.MedImage), med.MedMaskBlock if mask else med.CategoryBlock),
        splitter=med.ColSplitter('is_val'),
                             get_x=med.ColReader('x'), get_y=med.ColReader('y'))
    return block.dataloaders(pd.DataFrame(rows), bs=N, num_workers=0, device='cpu')

def volume_classes():
    return Learner(volumes(False), import_module('monai.networks.nets').resnet10(n_input_channels=1, num_classes=CLASSES, spatial_dims=3,
        feed_forward=True), CrossEntropyLossFlat())
def dice(): return import_module('fastMONAI.vision_loss').CustomLoss(import_module('monai.losses').DiceLoss(sigmoid=True))
def volume_masks():
    return Learner(volumes(True), import_module('monai.networks.nets').UNet(3, 1, 1, (8, 16, 32), (2, 2), num_res_units=1), dice())

FASTMONAI = [Entry('MedImage, monai resnet10', 'fastMONAI', learn=volume_classes),
    Entry('MedMask, monai UNet, DiceLoss', 'fastMONAI', learn=volume_masks, loss='numbers', own_loss=dice)]

# fasterai

def sparsify():
    return [attribute('fasterai.sparse.all', 'SparsifyCallback', .5, 'weight', 'local', import_module('fasterai.core.criteria').large_final,
        import_module('fasterai.core.schedule').agp)()]
def slim(name, cbs): return Entry(name, 'fasterai', attribute('torchvision.models', 'resnet18', num_classes=CLASSES), images(), cbs=cbs)

FASTERAI = [slim('resnet18, SparsifyCallback', sparsify)]

# others

def spectra():
    data,models,learner = (import_module(f'soilspecdl.{o}') for o in ('dataloader', 'models', 'learner'))
    dls,_ = data.get_spectral_dls(np.random.randn(ITEMS, 400).astype('float32'), np.random.randn(ITEMS).astype('float32'), np.arange(400),
        bs=N)
    return learner.spectral_learner(dls, models.SpectralCNN(dropout=0.))

def dask_table():
    pd,dd,core,data = (import_module(o) for o in ('pandas', 'dask.dataframe', 'bigtabular.core', 'bigtabular.data'))
    df = pd.DataFrame(dict(a=[f'a{i%6}' for i in range(ITEMS)], b=np.random.randn(ITEMS), y=[f'y{i%CLASSES}' for i in range(ITEMS)]))
    dls = data.DaskDataLoaders.from_ddf(dd.from_pandas(df, npartitions=2),
    procs=[core.DaskCategorify, core.DaskNormalize], cat_names=['a'], cont_names=['b'], y_names='y', y_block=core.DaskCategoryBlock(), bs=N)
    return import_module('bigtabular.learner').dask_learner(dls, layers=[20, 10])

OTHERS = [Entry('SpectralCNN, spectral_learner', 'soilspecdl', learn=spectra, loss='numbers'),
    Entry('TabularModel, dask_learner', 'bigtabular', learn=dask_table),
    Entry('TabNetModel', 'fast-tabnet', attribute('fast_tabnet.core', 'TabNetModel', [(VOCAB, 6), (VOCAB, 4)], 3, CLASSES), row),
    Entry('create_inception', 'timeseries-fastai', attribute('timeseries_fastai.models', 'create_inception', 3, CLASSES), floats(3, 40)),
    Entry('create_resnet', 'timeseries-fastai', attribute('timeseries_fastai.models', 'create_resnet', 3, CLASSES), floats(3, 40))]

ZOO = [*FASTAI, *TORCHVISION, *TIMM, *HUGGING, *TSAI, *FASTMONAI, *FASTERAI, *OTHERS]
